//! Flags of a tree search, and of what else looks at steps.

use clap::{Args, ValueEnum};
use rksc::solver::{SearchConfig, SolverConfig, StepScore};

#[derive(Args, Clone)]
pub(crate) struct SearchArgs {
    /// Grow the branches as a tree of so many levels: each kept node into as many steps as there are branches, and on
    /// the last level to the end of the solution. More than 1 needs a --temperature.
    #[arg(long, value_name = "D")]
    depth: Option<usize>,
    /// Nodes kept of each level before the last.
    #[arg(long, value_name = "K", default_value_t = 4, requires = "depth")]
    beam: usize,
    /// What a step is worth: its mean top-1 probability, the verifier's yes on a fork of it, or their product (the
    /// former's square root).
    #[arg(long, value_name = "SCORE", default_value = "confidence", requires = "depth")]
    score: Score,
    /// Prune nodes scored below this even where the beam has a place.
    #[arg(long, value_name = "X", requires = "depth", allow_negative_numbers = true)]
    min_step_score: Option<f64>,
    /// Ends a step; \n and \t are read as written [default: as the prompt pack says].
    #[arg(long, value_name = "TEXT", value_parser = parse_delimiter)]
    step_delimiter: Option<String>,
    /// How sure a trial answer must be for --decode-exit trial: geometric mean of its tokens' top-1 probabilities.
    #[arg(long, value_name = "P")]
    trial_confidence: Option<f64>,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Score {
    Confidence,
    Verifier,
    Both,
}

impl From<Score> for StepScore {
    fn from(score: Score) -> Self {
        match score {
            Score::Confidence => Self::Confidence,
            Score::Verifier => Self::Verifier,
            Score::Both => Self::Both,
        }
    }
}

impl SearchArgs {
    pub(crate) fn apply(&self, config: &mut SolverConfig) {
        let (beam, score, min_score) = (self.beam, self.score.into(), self.min_step_score);
        config.search = self.depth.map(|depth| SearchConfig { depth, beam, score, min_score });
        config.step_delimiter = self.step_delimiter.clone();
        if let Some(confidence) = self.trial_confidence {
            config.trial_rule.confidence = confidence;
        }
    }
}

/// A shell passes `\n` on as two characters.
fn parse_delimiter(text: &str) -> Result<String, String> {
    let text = text.replace("\\n", "\n").replace("\\t", "\t");
    if text.is_empty() { Err("an empty delimiter ends nothing".into()) } else { Ok(text) }
}
