//! `calibration.json`: what was found, for whom, and from what. It holds no times and no paths, so that the same input
//! gives the same bytes.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{AsksSetting, Counts, ExitSetting, Goal, Part, Parts, Records, Setup, asks, outside, verdicts};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::gate::asks::{Asks, AsksScope};
use crate::gate::verify::SkipRule;
use crate::model::weights::fingerprint::sha256;
use crate::solver::select::Select;
use crate::solver::{Calibrated, SolverConfig};
use crate::stats::clopper_pearson;

/// The format's version.
const VERSION: u32 = 1;

/// A calibration file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    version: u32,
    /// Fingerprint of the model it was made for (see [`Engine::fingerprint`](crate::Engine::fingerprint)).
    pub model: String,
    /// Compute type it was made with.
    pub dtype: String,
    /// Problems it was made from; those with an answer count.
    pub problems: FileRef,
    /// Pairs that must not become one.
    pub negatives: Option<FileRef>,
    /// What was asked for.
    pub goal: Goal,
    /// How the problems were run.
    pub setup: Setup,
    /// What was found.
    #[serde(flatten)]
    pub parts: Parts,
}

/// A file by its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Its name, without folders.
    pub file: String,
    /// SHA-256 of its bytes.
    pub sha256: String,
    /// Lines of it that count.
    pub count: usize,
}

impl FileRef {
    /// The file at `path` with these bytes, of which `count` entries count.
    pub fn new(path: &Path, bytes: &[u8], count: usize) -> Self {
        let file = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        Self { file, sha256: sha256(bytes), count }
    }
}

/// Which mechanisms a run leaves the thresholds of to a calibration: those switched on without numbers of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usable {
    /// The rule by which verification is skipped.
    pub skip: bool,
    /// The exit between layers, over the verdicts.
    pub verify_exit: bool,
    /// Sharing among the wordings of a problem.
    pub asks: bool,
}

impl Usable {
    /// True where nothing is left to a calibration.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// A stored setting on other problems.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MechanismCheck {
    /// The mechanism.
    pub mechanism: &'static str,
    /// Its setting, in words.
    pub setting: String,
    /// What it did.
    pub counts: Counts,
    /// Clopper-Pearson interval (95 %, two-sided) of the share that went from right to wrong.
    pub interval: [f64; 2],
    /// The same of the share that went from wrong to right.
    pub gain_interval: [f64; 2],
    /// One-sided upper limit at the calibration's confidence.
    pub bound: f64,
    /// `shown` (the limit is at most the target), `not refuted` (the interval holds the target) or `refuted`.
    pub verdict: &'static str,
    /// Share of the work left out.
    pub saving: f64,
}

impl Calibration {
    /// A file to be written.
    pub fn new(
        model: String,
        dtype: String,
        files: (FileRef, Option<FileRef>),
        goal: Goal,
        made: (Setup, Parts),
    ) -> Self {
        let ((problems, negatives), (setup, parts)) = (files, made);
        Self { version: VERSION, model, dtype, problems, negatives, goal, setup, parts }
    }

    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(path, &bytes)
    }

    /// As [`read`](Self::read), for bytes at hand; `path` is for messages.
    pub fn from_bytes(path: &Path, bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            version: Option<u32>,
        }
        let bad = |e: serde_json::Error| Error::format(path, e.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(bad)?;
        match head.version {
            Some(VERSION) => serde_json::from_slice(bytes).map_err(bad),
            Some(other) => {
                Err(Error::format(path, format!("field version: {other} is unknown; make the file anew (calibrate)")))
            }
            None => Err(Error::format(path, "field version is missing; this is no calibration")),
        }
    }

    /// The file's bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self).map_err(|e| Error::Internal(e.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Refuses another model and another compute type, by name.
    pub fn check_model(&self, name: &str, model: &str, dtype: DType) -> Result<()> {
        let way_out = "calibrate again, leave it out with --calibration off, or give the thresholds yourself";
        if self.model != model {
            let short = |hash: &str| hash.chars().take(12).collect::<String>();
            let (made, here) = (short(&self.model), short(model));
            let why = format!("{name} was made for another model ({made}, this one is {here}); {way_out}");
            return Err(Error::config("calibration", why));
        }
        if self.dtype != dtype.to_string() {
            let why = format!("{name} was made for dtype {}, this run is {dtype}; {way_out}", self.dtype);
            return Err(Error::config("calibration", why));
        }
        Ok(())
    }

    /// Sets the thresholds that `config` leaves to a calibration, and says so in it. `name` is the file's, `setup` the
    /// run's.
    pub fn apply(&self, name: &str, config: &mut SolverConfig, usable: Usable, setup: &Setup) {
        let (mut used, mut unused) = (Vec::new(), Vec::new());
        let mut note = |mechanism: &str, set: std::result::Result<String, String>| match set {
            Ok(setting) => used.push(format!("{mechanism} {setting}")),
            Err(why) => unused.push(format!("{mechanism}: {why}")),
        };
        if usable.skip
            && let Some((mechanism, part)) = self.skip_part(config.skip)
        {
            note(mechanism, take(part, |&rule| config.skip = rule));
        }
        if usable.verify_exit {
            let set = |s: &ExitSetting| config.verify_exit = Some(s.exit());
            note("verify-exit", take(&self.parts.verify_exit, set));
        }
        let mut shares = false;
        if usable.asks {
            let vote = config.select == Select::Vote;
            let within = config.asks.is_some_and(|a| a.scope == AsksScope::Problem && a.recompute.is_none());
            let set = |s: &AsksSetting| config.asks = Some(Asks::from(*s));
            note(
                "asks",
                match (vote, within) {
                    (true, true) => take(&self.parts.asks, set),
                    (false, _) => Err("calibrated for --select vote alone".into()),
                    (_, false) => Err("calibrated for the wordings of one problem, taken over whole".into()),
                },
            );
            shares = used.iter().any(|u| u.starts_with("asks"));
        }
        let setup = Setup { wordings: if shares { setup.wordings } else { self.setup.wordings }, ..setup.clone() };
        let mut differs = self.setup.differences(&setup);
        differs.extend(outside(config));
        config.calibration = Some(Calibrated {
            file: name.to_string(),
            target: self.goal.target,
            confidence: self.goal.confidence,
            problems: self.problems.count,
            differs: if used.is_empty() { Vec::new() } else { differs },
            used,
            unused,
        });
    }

    fn skip_part(&self, rule: SkipRule) -> Option<(&'static str, &Part<SkipRule>)> {
        match rule {
            SkipRule::Never => None,
            SkipRule::Paper { .. } => Some(("skip paper", &self.parts.skip_paper)),
            SkipRule::Code { .. } => Some(("skip code", &self.parts.skip_code)),
            SkipRule::Agreement { .. } => Some(("skip agreement", &self.parts.skip_agreement)),
        }
    }

    /// The stored settings on other problems.
    pub fn check(&self, records: &Records) -> Vec<MechanismCheck> {
        let mut checks = Vec::new();
        let skips = [
            ("skip paper", &self.parts.skip_paper),
            ("skip code", &self.parts.skip_code),
            ("skip agreement", &self.parts.skip_agreement),
        ];
        for (mechanism, part) in skips {
            if let Some(rule) = &part.setting {
                checks.push(self.checked(mechanism, words(rule), verdicts::skip(rule, &records.problems)));
            }
        }
        if let Some(s) = &self.parts.verify_exit.setting {
            let counts = verdicts::exit(s, &records.problems, records.num_layers);
            checks.push(self.checked("verify-exit", words(s), counts));
        }
        if let Some(s) = &self.parts.asks.setting {
            let at = (records.depths.as_slice(), records.num_layers);
            checks.push(self.checked("asks", words(s), asks::share(s, &records.problems, &records.pairs, at)));
        }
        checks
    }

    fn checked(&self, mechanism: &'static str, setting: String, counts: Counts) -> MechanismCheck {
        let interval = clopper_pearson(counts.right_to_wrong, counts.n, 0.95);
        let bound = counts.bound(self.goal.confidence);
        let verdict = match bound <= self.goal.target {
            true => "shown",
            false if interval[0] <= self.goal.target => "not refuted",
            false => "refuted",
        };
        MechanismCheck {
            mechanism,
            setting,
            counts,
            interval,
            gain_interval: clopper_pearson(counts.wrong_to_right, counts.n, 0.95),
            bound,
            verdict,
            saving: counts.saving(),
        }
    }
}

/// Hands an admissible setting over, and says which; or why there is none.
fn take<S: Serialize>(part: &Part<S>, set: impl FnOnce(&S)) -> std::result::Result<String, String> {
    let setting = part.setting.as_ref().ok_or_else(|| format!("{}; the default stands", part.answer))?;
    set(setting);
    Ok(words(setting))
}

/// A setting's numbers by name.
fn words(setting: &impl Serialize) -> String {
    let value = serde_json::to_value(setting).unwrap_or_default();
    let fields = value.as_object().into_iter().flatten().filter(|(name, _)| *name != "rule");
    // f32 numbers pass through f64 there: what a user types is short.
    let short =
        |v: &serde_json::Value| v.as_f64().map_or_else(|| v.to_string(), |x| ((x * 1e6).round() / 1e6).to_string());
    fields.map(|(name, v)| format!("{name} {}", short(v))).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::{Evidence, Stop};
    use crate::gate::verify::VerifyExit;
    use crate::solver::Policy;

    fn part<S>(setting: Option<S>) -> Part<S> {
        let counts = Counts { n: 200, fired: 3, saved: 1, work: 4, ..Counts::default() };
        let goal = Goal { target: 0.02, confidence: 0.95 };
        Part {
            answer: if setting.is_some() { "admissible".into() } else { "no admissible setting: it is so".into() },
            evidence: setting.is_some().then(|| Evidence::of(counts, goal)),
            setting,
            saves: "work".into(),
            settings: 9,
            held: 4,
            stopped_at: None,
        }
    }

    fn setup() -> Setup {
        let (prompts, prefix) = (sha256(b"pack"), sha256(b""));
        Setup { branches: 8, wordings: 5, max_new_tokens: 256, prompts, prefix, in_flight: 1 }
    }

    fn calibration() -> Calibration {
        let exit = ExitSetting { min_layer: 3, every: 2, theta: 0.3, epsilon: 0.2 };
        let parts = Parts {
            skip_paper: part(Some(SkipRule::Paper { tau: 0.9, rel_gap: 0.01 })),
            skip_code: part(None),
            skip_agreement: part(Some(SkipRule::Agreement { k: 7 })),
            verify_exit: part(Some(exit)),
            asks: part(Some(AsksSetting { tau: 0.97, probe_layers: 4 })),
        };
        let problems = FileRef::new(Path::new("some/where/dev.jsonl"), b"abc", 200);
        let goal = Goal { target: 0.02, confidence: 0.95 };
        Calibration::new("a".repeat(64), "bf16".into(), (problems, None), goal, (setup(), parts))
    }

    #[test]
    fn a_file_comes_back_as_it_was_written() {
        let mut c = calibration();
        c.parts.asks.stopped_at = Some(Stop {
            setting: AsksSetting { tau: 0.9995, probe_layers: 1 },
            evidence: Evidence::of(Counts { n: 200, pairs: 750, false_merges: 700, ..Counts::default() }, c.goal),
        });
        let bytes = c.to_bytes().unwrap();
        assert_eq!(Calibration::from_bytes(Path::new("c"), &bytes).unwrap(), c);
        assert_eq!(bytes, c.to_bytes().unwrap());
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains("\"file\": \"dev.jsonl\"") && !text.contains("where"), "{text}");
    }

    #[test]
    fn what_is_no_calibration_is_refused() {
        for (text, what) in [
            ("{}", "field version is missing"),
            ("{\"version\": 9}", "field version: 9 is unknown"),
            ("{\"version\": 1}", "missing field"),
            ("[", "c.json"),
        ] {
            let message = Calibration::from_bytes(Path::new("c.json"), text.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with("c.json: ") && message.contains(what), "{message}");
        }
    }

    #[test]
    fn another_model_or_type_is_refused_with_a_way_out() {
        let c = calibration();
        assert!(c.check_model("c.json", &"a".repeat(64), DType::Bf16).is_ok());
        for (model, dtype, what) in
            [("b", DType::Bf16, "another model"), ("a", DType::F32, "dtype bf16, this run is f32")]
        {
            let message = c.check_model("c.json", &model.repeat(64), dtype).unwrap_err().to_string();
            assert!(message.contains(what) && message.contains("--calibration off"), "{message}");
            assert!(message.starts_with("calibration: c.json"), "{message}");
        }
    }

    fn applied(usable: Usable, change: impl FnOnce(&mut SolverConfig)) -> SolverConfig {
        let mut config = SolverConfig {
            skip: SkipRule::PAPER,
            verify_exit: Some(VerifyExit::CANDIDATES),
            asks: Some(Asks::default()),
            wordings: 5,
            ..SolverConfig::preset(Policy::Exact)
        };
        change(&mut config);
        calibration().apply("c.json", &mut config, usable, &setup());
        config
    }

    const ALL: Usable = Usable { skip: true, verify_exit: true, asks: true };

    #[test]
    fn thresholds_are_taken_where_they_are_left_open() {
        let config = applied(ALL, |_| ());
        assert_eq!(config.skip, SkipRule::Paper { tau: 0.9, rel_gap: 0.01 });
        let exit = config.verify_exit.unwrap();
        assert_eq!((exit.min_layer, exit.every, exit.theta, exit.epsilon), (3, 2, 0.3, 0.2));
        assert_eq!(config.asks, Some(Asks { tau: 0.97, probe_layers: 4, ..Asks::default() }));
        let note = config.calibration.unwrap();
        assert_eq!(note.used[0], "skip paper tau 0.9, rel_gap 0.01");
        assert_eq!(note.used[2], "asks tau 0.97, probe_layers 4");
        assert!(note.unused.is_empty() && note.differs.is_empty(), "{note:?}");

        let config = applied(Usable { verify_exit: true, ..Usable::default() }, |_| ());
        assert_eq!((config.skip, config.asks), (SkipRule::PAPER, Some(Asks::default())));
        assert_eq!(config.calibration.unwrap().used.len(), 1);
    }

    #[test]
    fn what_the_promise_does_not_cover_is_not_taken_or_said() {
        let config = applied(ALL, |c| c.skip = SkipRule::CODE);
        assert_eq!(config.skip, SkipRule::CODE);
        assert!(
            config.calibration.unwrap().unused[0].contains("skip code: no admissible setting: it is so; the default")
        );

        let config = applied(ALL, |c| c.select = Select::ScoreSqrtConf);
        assert_eq!(config.asks, Some(Asks::default()));
        assert!(config.calibration.unwrap().unused[0].contains("--select vote"));

        let config = applied(ALL, |c| c.asks = Some(Asks { recompute: Some(0.1), ..Asks::default() }));
        assert!(config.calibration.unwrap().unused[0].contains("taken over whole"));

        let config = applied(Usable { skip: true, ..Usable::default() }, |c| {
            c.select = Select::ScoreSqrtConf;
            c.decode_exit = crate::gate::step::DecodeExit::Decided;
        });
        assert_eq!(config.calibration.unwrap().differs, ["decoding may end early"]);

        let config = applied(ALL, |c| c.kv = Some(crate::kv::budget::KvLimit::new(64)));
        assert_eq!(config.calibration.unwrap().differs, ["branches have a KV budget"]);
    }

    #[test]
    fn a_check_tells_shown_from_not_refuted_and_refuted() {
        let c = calibration();
        let of = |n, right_to_wrong| {
            c.checked("asks", String::new(), Counts { n, right_to_wrong, ..Counts::default() }).verdict
        };
        assert_eq!([of(500, 0), of(500, 8), of(500, 30)], ["shown", "not refuted", "refuted"]);
    }
}
