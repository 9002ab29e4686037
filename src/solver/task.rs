//! A problem as the solver sees it: tokens in, tokens out.

use std::sync::Arc;

use crate::chat::ChatTemplate;
use crate::error::{Error, Result};
use crate::problems::Problem;
use crate::prompts::{AnswerFinder, PromptPack};
use crate::tokenizer::{StopScanner, Tokenizer};

/// What the solver needs to know of a problem.
pub trait Task: Send {
    /// Its id in reports.
    fn id(&self) -> &str;
    /// The expected answer, if known.
    fn expected(&self) -> Option<&str>;
    /// Tokens common to all branches.
    fn root(&self) -> &[u32];
    /// Wordings of the same question, the root's among them.
    fn num_wordings(&self) -> usize {
        1
    }
    /// The root in another wording; 0 is the root as it is.
    fn wording(&self, idx: usize) -> Result<&[u32]> {
        match idx {
            0 => Ok(self.root()),
            _ => Err(Error::config("wordings", format!("problem {} has no wording {idx}", self.id()))),
        }
    }
    /// The numbers that wording `idx` speaks of, sorted; prompts with different ones never become one.
    fn numbers(&self, _wording: usize) -> Vec<String> {
        Vec::new()
    }
    /// What branch `idx` appends to them.
    fn branch(&self, idx: usize) -> Result<&[u32]>;
    /// Tokens that end a branch.
    fn end_tokens(&self) -> &[u32];
    /// Watches one branch for the strings that end a solution early; `None` when there are none.
    fn stop_scanner(&self) -> Option<StopScanner>;
    /// Watches one branch for the end of a step; `None` when the task has no text, or an empty delimiter. `delimiter`
    /// stands in for the task's own.
    fn step_scanner(&self, delimiter: Option<&str>) -> Option<StopScanner>;
    /// Elicits the answer behind a step; `None` when the task has no words for that.
    fn trial(&self) -> Option<&[u32]>;
    /// Asks for the verdict behind a solution.
    fn verify_suffix(&self) -> &[u32];
    /// A verification prompt that stands alone.
    fn verify_fresh(&self, generated: &[u32]) -> Result<Vec<u32>>;
    /// Tokens that mean yes, and those that mean no.
    fn verdict_tokens(&self) -> (&[u32], &[u32]);
    /// The text of a solution; empty when there is no tokenizer.
    fn text(&self, generated: &[u32]) -> Result<String>;
    /// The answer in a solution.
    fn answer(&self, text: &str) -> Option<String>;
}

/// A prompt pack, compiled for one tokenizer and one set of approaches.
#[derive(Debug)]
pub struct CompiledPack {
    pack: PromptPack,
    tokenizer: Arc<Tokenizer>,
    finder: AnswerFinder,
    branches: Vec<Vec<u32>>,
    verify_suffix: Vec<u32>,
    yes: Vec<u32>,
    no: Vec<u32>,
    end_tokens: Vec<u32>,
    trial: Option<Vec<u32>>,
    prefix: String,
}

impl CompiledPack {
    /// Encodes what does not change from problem to problem. A spelling of yes or no that is not one token is refused
    /// by name.
    pub fn new(pack: PromptPack, tokenizer: Arc<Tokenizer>, prefix: &str, end_tokens: &[u32]) -> Result<Self> {
        if pack.chat.is_some() {
            let why = format!("{:?} is for chat models, and this one has no chat template", pack.name);
            return Err(Error::config("prompts: chat", why));
        }
        let one = |field: &str, spelling: &String| {
            let why = || {
                Error::config(format!("prompts: {field}"), format!("{spelling:?} is not a single token of this model"))
            };
            tokenizer.single_token(spelling).ok_or_else(why)
        };
        let all = |field: &str, list: &[String]| list.iter().map(|s| one(field, s)).collect::<Result<Vec<_>>>();
        let verdicts = (all("yes", &pack.yes)?, all("no", &pack.no)?);
        Self::compile(pack, tokenizer, prefix, end_tokens.to_vec(), verdicts, ["", "", ""])
    }

    /// As [`new`](Self::new), for a model with a chat template: a pack with [`chat`](PromptPack::chat) is said through it, and
    /// the token that closes the model's turn ends a branch too. Of the spellings of yes and no those count that are one
    /// token where the verdict is said; there must be one of each.
    pub fn with_template(
        pack: PromptPack,
        template: &ChatTemplate,
        tokenizer: Arc<Tokenizer>,
        prefix: &str,
        end_tokens: &[u32],
    ) -> Result<Self> {
        if pack.chat.is_none() {
            return Self::new(pack, tokenizer, prefix, end_tokens);
        }
        let pack = pack.through(template, &tokenizer)?;
        let any = |field: &str, list: &[String]| -> Result<Vec<u32>> {
            let mut ids = Vec::new();
            for spelling in list {
                if let [id] = tokenizer.encode_behind(&pack.verify_suffix, spelling)?[..] {
                    ids.push(id);
                }
            }
            ids.sort_unstable();
            ids.dedup();
            if ids.is_empty() {
                let why = format!("none of {list:?} is a single token of this model where the verdict is said");
                return Err(Error::config(format!("prompts: {field}"), why));
            }
            Ok(ids)
        };
        let verdicts = (any("yes", &pack.yes)?, any("no", &pack.no)?);
        let mut end_tokens = end_tokens.to_vec();
        end_tokens.extend(template.turn_end(&tokenizer).filter(|id| !end_tokens.contains(id)));
        let root = pack.root("", "?");
        Self::compile(pack, tokenizer, prefix, end_tokens, verdicts, [&root, ".", "\n"])
    }

    /// `behind` is text that branches, the verification suffix and trials follow, so that their first tokens are those
    /// they have there.
    fn compile(
        pack: PromptPack,
        tokenizer: Arc<Tokenizer>,
        prefix: &str,
        end_tokens: Vec<u32>,
        (yes, no): (Vec<u32>, Vec<u32>),
        behind: [&str; 3],
    ) -> Result<Self> {
        let [root, solution, step] = behind;
        let branches = (0..pack.approaches.len())
            .filter_map(|i| pack.branch(i))
            .map(|text| tokenizer.encode_behind(root, &text))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            finder: pack.answer_finder()?,
            verify_suffix: tokenizer.encode_behind(solution, &pack.verify_suffix)?,
            yes,
            no,
            end_tokens,
            trial: pack.trial.as_deref().map(|text| tokenizer.encode_behind(step, text)).transpose()?,
            prefix: prefix.to_string(),
            branches,
            pack,
            tokenizer,
        })
    }

    /// The pack it was made from; of a chat pack, as the template says it.
    pub fn pack(&self) -> &PromptPack {
        &self.pack
    }
}

/// A problem in words.
pub struct TextTask {
    pack: Arc<CompiledPack>,
    problem: Problem,
    root: Vec<u32>,
    paraphrases: Vec<Vec<u32>>,
}

impl TextTask {
    /// Encodes the problem, in all its wordings, behind the pack's prefix.
    pub fn new(pack: Arc<CompiledPack>, problem: Problem) -> Result<Self> {
        let encode = |question: &String| pack.tokenizer.encode(&pack.pack.root(&pack.prefix, question));
        let root = encode(&problem.question)?;
        let paraphrases = problem.paraphrases.iter().map(encode).collect::<Result<_>>()?;
        Ok(Self { pack, problem, root, paraphrases })
    }

    fn question(&self, wording: usize) -> &str {
        let paraphrase = wording.checked_sub(1).and_then(|i| self.problem.paraphrases.get(i));
        paraphrase.unwrap_or(&self.problem.question)
    }
}

impl Task for TextTask {
    fn id(&self) -> &str {
        &self.problem.id
    }

    fn expected(&self) -> Option<&str> {
        self.problem.answer.as_deref()
    }

    fn root(&self) -> &[u32] {
        &self.root
    }

    fn num_wordings(&self) -> usize {
        1 + self.paraphrases.len()
    }

    fn wording(&self, idx: usize) -> Result<&[u32]> {
        let Some(paraphrase) = idx.checked_sub(1) else { return Ok(&self.root) };
        self.paraphrases.get(paraphrase).map(Vec::as_slice).ok_or_else(|| {
            Error::config("wordings", format!("problem {} has {} paraphrases", self.id(), self.paraphrases.len()))
        })
    }

    fn numbers(&self, wording: usize) -> Vec<String> {
        crate::gate::asks::numbers(self.question(wording))
    }

    fn branch(&self, idx: usize) -> Result<&[u32]> {
        let branches = &self.pack.branches;
        branches.get(idx).map(Vec::as_slice).ok_or_else(|| {
            let why = format!("the prompt pack has {} approaches; give more with --approaches FILE", branches.len());
            Error::config("branches", why)
        })
    }

    fn end_tokens(&self) -> &[u32] {
        &self.pack.end_tokens
    }

    fn stop_scanner(&self) -> Option<StopScanner> {
        let stops = &self.pack.pack.stops;
        (!stops.is_empty()).then(|| StopScanner::new(self.pack.tokenizer.decoder(), stops.clone()))
    }

    fn step_scanner(&self, delimiter: Option<&str>) -> Option<StopScanner> {
        let delimiter = delimiter.unwrap_or(&self.pack.pack.step_delimiter);
        (!delimiter.is_empty()).then(|| StopScanner::new(self.pack.tokenizer.decoder(), vec![delimiter.to_string()]))
    }

    fn trial(&self) -> Option<&[u32]> {
        self.pack.trial.as_deref()
    }

    fn verify_suffix(&self) -> &[u32] {
        &self.pack.verify_suffix
    }

    fn verify_fresh(&self, generated: &[u32]) -> Result<Vec<u32>> {
        let solution = self.text(generated)?;
        self.pack.tokenizer.encode(&self.pack.pack.fresh(&self.problem.question, &solution))
    }

    fn verdict_tokens(&self) -> (&[u32], &[u32]) {
        (&self.pack.yes, &self.pack.no)
    }

    fn text(&self, generated: &[u32]) -> Result<String> {
        self.pack.tokenizer.decode(generated)
    }

    fn answer(&self, text: &str) -> Option<String> {
        self.pack.finder.find(text)
    }
}

/// Token ids of stated lengths, for speed measurements on shapes without a tokenizer.
pub struct SyntheticTask {
    id: String,
    root: Vec<u32>,
    branches: Vec<Vec<u32>>,
    verify_common: Vec<u32>,
    verify_suffix: Vec<u32>,
    verdict: [u32; 2],
}

/// Lengths of a synthetic problem, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SyntheticLengths {
    /// Common to all branches.
    pub prefix: usize,
    /// Each branch's own.
    pub suffix: usize,
    /// Common to the fresh verification prompts.
    pub verify_common: usize,
    /// The verification question.
    pub verify_suffix: usize,
}

impl Default for SyntheticLengths {
    /// The paper's shapes.
    fn default() -> Self {
        Self { prefix: 1024, suffix: 32, verify_common: 333, verify_suffix: 14 }
    }
}

impl SyntheticTask {
    /// Deterministic token ids below `vocab`, different from problem to problem and from branch to branch.
    pub fn new(idx: usize, num_branches: usize, vocab: usize, lengths: SyntheticLengths) -> Self {
        let ids = |stream: u64, len: usize| -> Vec<u32> {
            (0..len as u64)
                .map(|i| {
                    let key = (idx as u64) << 40 | stream << 24 | i;
                    (crate::sampler::child_path(key, 1) % vocab as u64) as u32
                })
                .collect()
        };
        Self {
            id: format!("synthetic-{idx}"),
            root: ids(0, lengths.prefix),
            branches: (0..num_branches as u64).map(|b| ids(1 + b, lengths.suffix)).collect(),
            verify_common: ids(5000, lengths.verify_common),
            verify_suffix: ids(5001, lengths.verify_suffix),
            verdict: [0, 1],
        }
    }
}

impl Task for SyntheticTask {
    fn id(&self) -> &str {
        &self.id
    }
    fn expected(&self) -> Option<&str> {
        None
    }
    fn root(&self) -> &[u32] {
        &self.root
    }
    fn branch(&self, idx: usize) -> Result<&[u32]> {
        self.branches.get(idx).map(Vec::as_slice).ok_or_else(|| Error::config("branches", "no such synthetic branch"))
    }
    fn end_tokens(&self) -> &[u32] {
        &[]
    }
    fn stop_scanner(&self) -> Option<StopScanner> {
        None
    }
    fn step_scanner(&self, _delimiter: Option<&str>) -> Option<StopScanner> {
        None
    }
    fn trial(&self) -> Option<&[u32]> {
        None
    }
    fn verify_suffix(&self) -> &[u32] {
        &self.verify_suffix
    }
    fn verify_fresh(&self, generated: &[u32]) -> Result<Vec<u32>> {
        Ok([&self.verify_common, generated, &self.verify_suffix].concat())
    }
    fn verdict_tokens(&self) -> (&[u32], &[u32]) {
        (&self.verdict[..1], &self.verdict[1..])
    }
    fn text(&self, _generated: &[u32]) -> Result<String> {
        Ok(String::new())
    }
    fn answer(&self, _text: &str) -> Option<String> {
        None
    }
}
