//! Sampling through the engine: every option changes what it should, and nothing else decides a draw.

mod common;

use common::*;
use rksc::engine::{BranchId, Engine, GenerateParams};
use rksc::sampler::{DrawKey, SamplingParams, sample};
use rksc::testing::fill::Fill;

/// The sampler's law in plain f64: probabilities of all tokens.
fn law(logits: &[f32], params: &SamplingParams, prompt: &[u32], generated: &[u32]) -> Vec<f64> {
    let mut y: Vec<f64> = logits.iter().map(|&x| f64::from(x)).collect();
    for (token, y) in y.iter_mut().enumerate() {
        let token = token as u32;
        *y += params.logit_bias.iter().filter(|(t, _)| *t == token).map(|(_, b)| f64::from(*b)).sum::<f64>();
        let count = generated.iter().filter(|&&t| t == token).count();
        let penalty = f64::from(params.repetition_penalty);
        if count > 0 || prompt.contains(&token) {
            *y = if *y > 0.0 { *y / penalty } else { *y * penalty };
        }
        if count > 0 {
            *y -= f64::from(params.presence_penalty) + f64::from(params.frequency_penalty) * count as f64;
        }
    }
    let mut order: Vec<usize> = (0..y.len()).collect();
    order.sort_by(|&a, &b| y[b].total_cmp(&y[a]).then(a.cmp(&b)));
    let weight = |i: usize| ((y[i] - y[order[0]]) / f64::from(params.temperature)).exp();
    let mut kept: Vec<usize> =
        order.iter().copied().filter(|&i| weight(i) >= f64::from(params.min_p) && weight(i) > 0.0).collect();
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&i| weight(i)).sum();
    let mut sum = 0.0;
    let nucleus = kept.iter().position(|&i| {
        sum += weight(i);
        sum >= f64::from(params.top_p) * total
    });
    kept.truncate(nucleus.map_or(kept.len(), |at| at + 1));
    let total: f64 = kept.iter().map(|&i| weight(i)).sum();
    let mut probabilities = vec![0.0; y.len()];
    kept.iter().for_each(|&i| probabilities[i] = weight(i) / total);
    probabilities
}

/// An upper bound of the 0.999 quantile of chi-square (Wilson and Hilferty, with a margin).
fn quantile(freedom: usize) -> f64 {
    let k = freedom as f64;
    k * (1.0 - 2.0 / (9.0 * k) + 3.0902 * (2.0 / (9.0 * k)).sqrt()).powi(3) * 1.01
}

/// 100,000 draws a setting.
#[test]
fn draws_follow_their_law_under_every_setting() {
    let mut fill = Fill::new(11);
    let logits = fill.normals(24, 1.5);
    let (prompt, generated) = ([3, 4, 5, 5], [4, 7, 7, 7, 9]);
    let base = SamplingParams { temperature: 1.0, seed: 42, ..Default::default() };
    let settings = [
        base.clone(),
        SamplingParams { temperature: 0.6, ..base.clone() },
        SamplingParams { temperature: 2.5, ..base.clone() },
        SamplingParams { top_k: 5, ..base.clone() },
        SamplingParams { top_p: 0.7, ..base.clone() },
        SamplingParams { min_p: 0.1, ..base.clone() },
        SamplingParams { repetition_penalty: 1.4, ..base.clone() },
        SamplingParams { presence_penalty: 0.8, ..base.clone() },
        SamplingParams { frequency_penalty: 0.5, ..base.clone() },
        SamplingParams { logit_bias: vec![(2, 3.0), (9, -2.0), (11, f32::NEG_INFINITY)], ..base.clone() },
        SamplingParams {
            temperature: 1.3,
            top_k: 12,
            top_p: 0.95,
            min_p: 0.02,
            repetition_penalty: 1.2,
            presence_penalty: 0.3,
            frequency_penalty: 0.2,
            logit_bias: vec![(4, 1.5), (7, 2.0), (20, f32::NEG_INFINITY)],
            ..base
        },
    ];
    let n = 100_000;
    for params in settings {
        let law = law(&logits, &params, &prompt, &generated);
        let mut counts = vec![0u32; logits.len()];
        let mut row = logits.clone();
        for position in 0..n {
            row.copy_from_slice(&logits);
            for &(token, bias) in &params.logit_bias {
                row[token as usize] += bias;
            }
            counts[sample(&mut row, &params, &prompt, &generated, DrawKey { path: 9, position }) as usize] += 1;
        }
        let possible = law.iter().filter(|&&p| p > 0.0).count();
        let chi: f64 = law
            .iter()
            .zip(&counts)
            .filter(|(p, _)| **p > 0.0)
            .map(|(p, &count)| (f64::from(count) - p * n as f64).powi(2) / (p * n as f64))
            .sum();
        assert!(chi < quantile(possible - 1), "{params:?}: chi-square {chi} with {possible} tokens");
        let impossible: u32 = law.iter().zip(&counts).filter(|(p, _)| **p == 0.0).map(|(_, c)| c).sum();
        assert_eq!(impossible, 0, "{params:?}");
    }
}

fn start(engine: &mut Engine, params: GenerateParams) -> (BranchId, usize) {
    let prompt: Vec<u32> = (10..40).collect();
    let branch = engine.prefill(&prompt, uncached()).unwrap();
    engine.start(branch, params).unwrap();
    (branch, prompt.len())
}

fn text(engine: &mut Engine, sampling: SamplingParams) -> Vec<u32> {
    let (branch, prompt_len) = start(engine, GenerateParams { sampling, ..greedy(24) });
    run_all(engine);
    generated(engine, branch, prompt_len)
}

#[test]
fn every_option_changes_what_is_generated() {
    let mut engine = engine(|_| ());
    let greedy_text = text(&mut engine, SamplingParams::default());
    let drawn = SamplingParams { temperature: 1.5, seed: 3, ..Default::default() };
    let drawn_text = text(&mut engine, drawn.clone());
    assert_ne!(drawn_text, greedy_text);
    let first = greedy_text[0];
    let greedy_options = [
        SamplingParams { repetition_penalty: 5.0, ..Default::default() },
        SamplingParams { presence_penalty: 50.0, ..Default::default() },
        SamplingParams { frequency_penalty: 50.0, ..Default::default() },
        SamplingParams { logit_bias: vec![(first, f32::NEG_INFINITY)], ..Default::default() },
    ];
    for option in greedy_options {
        assert_ne!(text(&mut engine, option.clone()), greedy_text, "{option:?}");
    }
    let drawn_options = [
        SamplingParams { seed: 4, ..drawn.clone() },
        SamplingParams { temperature: 0.5, ..drawn.clone() },
        SamplingParams { top_k: 2, ..drawn.clone() },
        SamplingParams { top_p: 0.3, ..drawn.clone() },
        SamplingParams { min_p: 0.5, ..drawn.clone() },
    ];
    for option in drawn_options {
        assert_ne!(text(&mut engine, option.clone()), drawn_text, "{option:?}");
    }
    assert_eq!(text(&mut engine, SamplingParams { top_k: 1, ..drawn }), greedy_text);
}

/// A banned token never comes; one with a bias above all others always does.
#[test]
fn biases_ban_and_force_tokens() {
    let mut engine = engine(|_| ());
    let forced = text(&mut engine, SamplingParams { logit_bias: vec![(77, 1e6)], ..Default::default() });
    assert_eq!(forced, [77; 24]);
    let drawn = SamplingParams { temperature: 1.0, seed: 1, ..Default::default() };
    let common = text(&mut engine, drawn.clone());
    let bias: Vec<(u32, f32)> = {
        let mut tokens = common.clone();
        tokens.sort_unstable();
        tokens.dedup();
        tokens.into_iter().map(|token| (token, f32::NEG_INFINITY)).collect()
    };
    let without = text(&mut engine, SamplingParams { logit_bias: bias, ..drawn });
    assert!(without.iter().all(|token| !common.contains(token)), "{without:?}");
}

/// End tokens do not come before their time, whatever a bias says; then the bias counts again.
#[test]
fn a_minimum_of_tokens_bans_end_tokens_until_it_is_reached() {
    let mut engine = engine(|_| ());
    let sampling = SamplingParams { logit_bias: vec![(EOS, 1e6), (5, 1e5)], ..Default::default() };
    let params = GenerateParams { sampling, min_new_tokens: 7, end_tokens: vec![EOS], ..greedy(24) };
    let (branch, prompt_len) = start(&mut engine, params);
    run_all(&mut engine);
    assert_eq!(generated(&engine, branch, prompt_len), [5; 7]);
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    let mut engine = engine(|_| ());
    let bad = [
        (SamplingParams { logit_bias: vec![(1, f32::NAN)], ..Default::default() }, "logit-bias"),
        (SamplingParams { logit_bias: vec![(1, f32::INFINITY)], ..Default::default() }, "logit-bias"),
        (SamplingParams { logit_bias: vec![(1, 1.0), (1, 2.0)], ..Default::default() }, "logit-bias"),
        (SamplingParams { logit_bias: vec![(1 << 20, 1.0)], ..Default::default() }, "tokens"),
        (SamplingParams { temperature: -1.0, ..Default::default() }, "temperature"),
        (SamplingParams { temperature: f32::NAN, ..Default::default() }, "temperature"),
        (SamplingParams { top_p: 1.5, ..Default::default() }, "top-p"),
        (SamplingParams { min_p: 1.0, ..Default::default() }, "min-p"),
        (SamplingParams { repetition_penalty: 0.0, ..Default::default() }, "repetition-penalty"),
        (SamplingParams { presence_penalty: f32::INFINITY, ..Default::default() }, "presence-penalty"),
        (SamplingParams { frequency_penalty: f32::NAN, ..Default::default() }, "frequency-penalty"),
    ];
    let branch = engine.prefill(&[1, 2, 3], uncached()).unwrap();
    for (sampling, field) in bad {
        let why = engine.start(branch, GenerateParams { sampling: sampling.clone(), ..greedy(4) }).unwrap_err();
        assert!(why.to_string().contains(field), "{sampling:?}: {why}");
    }
}
