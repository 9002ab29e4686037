//! `--calibration`: thresholds that nobody gave, from the file beside the model or the one named.

use std::path::{Path, PathBuf};

use clap::Args;
use rksc::Engine;
use rksc::calibrate::{Calibration, Setup, Usable};
use rksc::config::{EngineConfig, ModelSource};
use rksc::solver::{Calibrated, SolverConfig};

#[derive(Args, Clone)]
pub(crate) struct CalibrationArgs {
    /// Thresholds for mechanisms that are switched on without numbers, made by `calibrate`; `off` uses none [default:
    /// calibration.json beside the model, the built-in one for the bundled model].
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
}

impl CalibrationArgs {
    /// Sets what `config` leaves open, and says so on stderr. A file that was named, or that a threshold hangs on, must
    /// fit the model and the compute type; one that merely lies beside the model may be for others.
    pub(crate) fn apply(
        &self,
        engine: &EngineConfig,
        config: &mut SolverConfig,
        usable: Usable,
        setup: &Setup,
    ) -> rksc::Result<()> {
        let named = self.calibration.as_deref();
        if named == Some(Path::new("off")) {
            return Ok(());
        }
        let found = match named {
            Some(path) => Some((path.display().to_string(), Calibration::read(path)?)),
            // The built-in one is no news to anybody.
            None if engine.model == ModelSource::Bundled && usable.is_empty() => None,
            None => engine.model.calibration()?,
        };
        let Some((name, calibration)) = found else { return Ok(()) };
        let fits = calibration.check_model(&name, &Engine::fingerprint(engine)?, engine.dtype);
        match fits {
            Err(why) if named.is_none() && usable.is_empty() => eprintln!("not used: {why}"),
            fits => {
                fits?;
                calibration.apply(&name, config, usable, setup);
                let approximate = [
                    (engine.quantise.is_some(), "weights in codes"),
                    (config.river.is_some_and(|r| !r.is_exact()), "early exit"),
                ];
                for (_, what) in approximate.into_iter().filter(|(is_set, _)| *is_set) {
                    config.calibration.iter_mut().for_each(|c| c.differs.push(what.into()));
                }
                config.calibration.as_ref().into_iter().for_each(|c| eprintln!("{}", in_words(c)));
            }
        }
        Ok(())
    }
}

/// One line: what a run took from a calibration, and what that promises.
pub(crate) fn in_words(c: &Calibrated) -> String {
    let percent = |x: f64| format!("{} %", (x * 1e6).round() / 1e4);
    let mut text = format!(
        "calibration {} (each at most {} right to wrong at {} confidence, {} problems): ",
        c.file,
        percent(c.target),
        percent(c.confidence),
        c.problems
    );
    if c.used.is_empty() {
        text += "nothing taken";
    } else {
        text += &c.used.join("; ");
    }
    for why in &c.unused {
        text += &format!("; {why}");
    }
    if !c.differs.is_empty() {
        text += &format!("; not promised here: {}", c.differs.join(", "));
    }
    text
}
