//! A configuration in words.

use super::markup::count;
use crate::gate::Over;
use crate::gate::asks::AsksScope;
use crate::gate::step::DecodeExit;
use crate::gate::verify::{SkipRule, VerifyExit};
use crate::report::kv::limit_in_words;
use crate::report::river::{exactness, river_in_words};
use crate::solver::select::Select;
use crate::solver::{Sharing, SolverConfig, StepScore, VerifyMode};

/// Sentences, each ending in a full stop.
pub(super) fn configuration(c: &SolverConfig) -> Vec<String> {
    let mut out = vec![branches(c)];
    out.extend([search(c), wordings(c), asks(c), kv(c), river(c), merge(c)].into_iter().flatten());
    out.push(verify(c));
    out.extend([skip(c), verify_exit(c), decode_exit(c)].into_iter().flatten());
    out.push(select(c));
    out.push(sampling(c));
    out.push(flight(c));
    out
}

fn branches(c: &SolverConfig) -> String {
    let n = c.num_branches;
    let length = if c.forced_length { "exactly" } else { "at most" };
    let branches = if n == 1 { "One branch".into() } else { format!("{n} branches") };
    let sharing = match c.sharing {
        Sharing::None => "each with a prompt of its own: nothing is shared",
        Sharing::Exact => "the KV of identical tokens is shared",
    };
    format!("{branches} a problem, {length} {} tokens each; {sharing}.", c.max_new_tokens)
}

fn search(c: &SolverConfig) -> Option<String> {
    let s = c.search.as_ref().filter(|s| s.depth > 1)?;
    let score = match s.score {
        StepScore::Confidence => "confidence",
        StepScore::Verifier => "the verifier",
        StepScore::Both => "the verifier x sqrt(confidence)",
    };
    Some(format!("They grow as a tree of {} levels; of each the best {} by {score} are kept.", s.depth, s.beam))
}

fn wordings(c: &SolverConfig) -> Option<String> {
    (c.wordings > 1).then(|| format!("They take turns among {} wordings of the problem.", c.wordings))
}

fn asks(c: &SolverConfig) -> Option<String> {
    let a = c.asks?;
    let scope = match a.scope {
        AsksScope::Problem => "of a problem",
        AsksScope::Batch => "in flight with the same numbers",
    };
    let then = match a.recompute {
        None => "go on as one: not exact".into(),
        Some(p) => {
            format!("keep their tokens and take over KV, {} % of it computed anew: not exact", f64::from(p) * 100.0)
        }
    };
    Some(format!(
        "Prompts {scope} that are {} alike after {} {then}.",
        a.tau,
        count(a.probe_layers as usize, "layer", "layers")
    ))
}

fn kv(c: &SolverConfig) -> Option<String> {
    Some(format!("A branch keeps {}: not exact.", limit_in_words(c.kv.as_ref()?)))
}

fn river(c: &SolverConfig) -> Option<String> {
    let river = c.river.as_ref()?;
    Some(format!("River, {}: {}.", exactness(river), river_in_words(river)))
}

fn merge(c: &SolverConfig) -> Option<String> {
    let m = c.merge?;
    Some(format!("Every {} steps, decoding branches that are {} alike are merged: not exact.", m.every, m.tau))
}

fn verify_exit(c: &SolverConfig) -> Option<String> {
    let e = c.verify_exit.filter(|_| c.verify != VerifyMode::Off)?;
    let over = entropy_over(c);
    let every = if e.every == 1 { String::new() } else { format!(", every {} layers", e.every) };
    let all = if e.all_or_none { ", all together or none" } else { "" };
    Some(format!(
        "From layer {} on{every}, a verification stops between layers once its entropy over {over} is below {} nats and \
         changes by less than {}{all}.",
        e.min_layer, e.theta, e.epsilon
    ))
}

/// What the entropies between the layers are taken over.
pub(super) fn entropy_over(c: &SolverConfig) -> &'static str {
    match c.verify_exit.unwrap_or(VerifyExit::CANDIDATES).over {
        Over::Vocabulary => "the vocabulary",
        Over::Watched => "the verdicts",
    }
}

fn verify(c: &SolverConfig) -> String {
    match c.verify {
        VerifyMode::Off => "Nothing is verified.",
        VerifyMode::Suffix => "Each branch is verified by a question behind its own solution, on its own KV.",
        VerifyMode::Fresh => "Each branch is verified by a prompt of its own, computed afresh.",
        VerifyMode::FreshShared => {
            "Each branch is verified by a prompt of its own; their common text is computed once."
        }
    }
    .into()
}

fn skip(c: &SolverConfig) -> Option<String> {
    if c.verify == VerifyMode::Off {
        return None;
    }
    Some(match c.skip {
        SkipRule::Never => "Verification is never skipped.".into(),
        SkipRule::Code { tau, gap, rel_gap } => format!(
            "Verification is skipped where the most confident branch reaches {tau} and leads by {gap}, or reaches nine \
             tenths of that and leads by {} % (the paper's code).",
            rel_gap * 100.0
        ),
        SkipRule::Paper { tau, rel_gap } => format!(
            "Verification is skipped where the most confident branch reaches {tau} and leads by {} % (the paper).",
            rel_gap * 100.0
        ),
        SkipRule::Agreement { k } => format!("Verification is skipped where {k} answers agree."),
    })
}

fn decode_exit(c: &SolverConfig) -> Option<String> {
    let r = c.exit_rule;
    let lead = format!(
        "{} % behind a leader with confidence {} from step {} on",
        r.rel_lead * 100.0,
        r.confidence,
        r.min_step
    );
    match c.decode_exit {
        DecodeExit::Off => None,
        DecodeExit::PerBranch => Some(format!("A branch stops when it is {lead}.")),
        DecodeExit::StopAll => Some(format!("All branches stop when the second is {lead}.")),
        DecodeExit::Decided => Some("Decoding stops once no open branch can change the vote.".into()),
        DecodeExit::Trial => Some(format!(
            "Decoding stops once no open branch can change the vote; after each step a fork is asked for the answer, and its \
             branch stops where that is sure ({}).",
            c.trial_rule.confidence
        )),
    }
}

fn select(c: &SolverConfig) -> String {
    match c.select {
        Select::Vote => "The answer with the largest sum of confidences wins.",
        Select::Majority => "The answer most branches give wins.",
        Select::ScoreSqrtConf => "The branch with the largest score x sqrt(confidence) wins.",
    }
    .into()
}

fn sampling(c: &SolverConfig) -> String {
    let s = &c.sampling;
    if s.temperature == 0.0 {
        "Greedy decoding.".into()
    } else {
        format!("Temperature {}, seed {}.", s.temperature, s.seed)
    }
}

fn flight(c: &SolverConfig) -> String {
    let cache = if c.cold_cache { "is emptied before each" } else { "is kept between them" };
    match c.concurrency {
        1 => format!("One problem at a time; the prefix cache {cache}."),
        n => format!("{n} problems at a time; the prefix cache {cache}."),
    }
}
