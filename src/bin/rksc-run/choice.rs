//! Continuations on their way: what the engine's tokens become as text, and where that ends.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use rksc::engine::{BranchId, EndReason, Engine, EventKind, GeneratedToken};
use rksc::tokenizer::{IncrementalDecoder, StopMatcher, Tokenizer};

/// Why a continuation ended whose numbers broke.
pub(crate) const NON_FINITE: &str = "error: non_finite";

/// One continuation.
pub(crate) struct Choice {
    pub(crate) branch: BranchId,
    decoder: IncrementalDecoder,
    stops: StopMatcher,
    /// Tokens that end it, and are no part of it.
    end_tokens: Arc<[u32]>,
    /// Special tokens that are shown all the same, as these texts.
    shown: Vec<(u32, String)>,
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<f32>,
    pub(crate) entropies: Vec<f32>,
    /// The most likely tokens in the place of each, where the branch watches them.
    pub(crate) top: Vec<Vec<(u32, f32)>>,
    pub(crate) finish: Option<String>,
}

/// Takes text as it comes.
pub(crate) type Emit<'a> = dyn FnMut(&str) -> anyhow::Result<()> + 'a;

/// Steps until all have ended; the time of the first token, in milliseconds. After an error they hold what has come so far.
pub(crate) fn run(engine: &mut Engine, choices: &mut [Choice], emit: &mut Emit) -> anyhow::Result<Option<f64>> {
    let started = Instant::now();
    let mut first_token_ms = None;
    while choices.iter().any(|c| c.finish.is_none()) {
        engine.step()?;
        while let Some(event) = engine.next_event() {
            let Some(choice) = choices.iter_mut().find(|c| c.branch == event.branch) else { continue };
            if matches!(event.kind, EventKind::Token(_)) {
                first_token_ms.get_or_insert_with(|| started.elapsed().as_secs_f64() * 1e3);
            }
            choice.take(engine, event.kind, emit)?;
        }
    }
    Ok(first_token_ms)
}

/// Text on stdout, at once.
pub(crate) fn show(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

impl Choice {
    pub(crate) fn new(branch: BranchId, tokenizer: &Tokenizer, stop: &[String], end_tokens: Arc<[u32]>) -> Self {
        Self {
            branch,
            decoder: tokenizer.visible_decoder(),
            stops: StopMatcher::new(stop.to_vec()),
            end_tokens,
            shown: Vec::new(),
            text: String::new(),
            tokens: Vec::new(),
            logprobs: Vec::new(),
            entropies: Vec::new(),
            top: Vec::new(),
            finish: None,
        }
    }

    /// Lets these tokens be seen although they are special.
    pub(crate) fn showing(self, shown: Vec<(u32, String)>) -> Self {
        Self { shown, ..self }
    }

    /// What happened to its branch in the step just run.
    pub(crate) fn take(&mut self, engine: &mut Engine, event: EventKind, emit: &mut Emit) -> anyhow::Result<()> {
        match event {
            EventKind::Token(token) => self.token(engine, &token, emit),
            EventKind::Ended(reason) => self.end(reason, emit),
            EventKind::Ready | EventKind::Preempted | EventKind::Aliased { .. } => Ok(()),
        }
    }

    fn token(
        &mut self,
        engine: &mut Engine,
        &GeneratedToken { token, logprob, stats }: &GeneratedToken,
        emit: &mut Emit,
    ) -> anyhow::Result<()> {
        if self.finish.is_some() || self.end_tokens.contains(&token) {
            return Ok(());
        }
        self.tokens.push(token);
        self.logprobs.push(logprob);
        self.entropies.push(stats.entropy);
        self.top.extend(engine.row(self.branch)?.map(|row| row.top.clone()));
        let mut text = self.decoder.push(token)?;
        if let Some((_, shown)) = self.shown.iter().find(|(id, _)| *id == token) {
            text = self.decoder.flush() + shown;
        }
        let (text, hit) = self.stops.push(&text);
        self.emit(&text, emit)?;
        if hit.is_some() {
            engine.stop(self.branch)?;
            self.finish = Some("stop".into());
        }
        Ok(())
    }

    /// It has ended: what was held back comes out.
    pub(crate) fn end(&mut self, reason: EndReason, emit: &mut Emit) -> anyhow::Result<()> {
        if self.finish.is_some() {
            return Ok(());
        }
        let rest = self.decoder.flush();
        let (text, hit) = self.stops.push(&rest);
        self.emit(&text, emit)?;
        if hit.is_none() {
            let held = self.stops.flush();
            self.emit(&held, emit)?;
        }
        self.finish = Some(match reason {
            EndReason::EndToken => "stop".into(),
            EndReason::Length | EndReason::Context => "length".into(),
            EndReason::NonFinite => NON_FINITE.into(),
            EndReason::Stopped | EndReason::Dropped | EndReason::Merged => "cancelled".into(),
        });
        Ok(())
    }

    fn emit(&mut self, text: &str, emit: &mut Emit) -> anyhow::Result<()> {
        self.text.push_str(text);
        emit(text)
    }
}
