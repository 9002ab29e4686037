//! Made-up records that fill every figure.

use rksc::engine::EndReason;
use rksc::report::{
    BranchResult, LayerEntropy, MemorySample, NodeEnd, NodeResult, PhaseMs, ProblemResult, SimilarityRecord,
    TokenCounts, TrialCounts, VerifyOutcome,
};

/// Numbers in [0, 1) that are the same in every run.
pub(crate) struct Draws(pub(crate) u64);

impl Draws {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() * n as f64) as usize
    }
}

pub(crate) fn branch(idx: usize, answer: &str, draws: &mut Draws) -> BranchResult {
    BranchResult {
        branch: idx,
        tokens: vec![7; 20 + draws.below(60)],
        text: format!("The answer is {answer}."),
        answer: Some(answer.into()),
        score: Some(draws.next()),
        confidence: 0.6 + 0.4 * draws.next(),
        ended: Some(EndReason::EndToken),
        votes: 1.0,
        exit_layer: None,
        layers: Vec::new(),
        wording: 0,
        merged_into: None,
        blocks_shared: 12,
        blocks_private: 3,
        kv_slots: 60,
        kv_full: 60,
        kv_cuts: 0,
        first_kv_cut: None,
    }
}

/// A problem as plain solving leaves it: no layers, no similarity, no tree, no memory.
pub(crate) fn plain(idx: usize, branches: usize) -> ProblemResult {
    let mut draws = Draws(idx as u64 + 1);
    let phase_ms = PhaseMs {
        prefill: 10.0 + 30.0 * draws.next(),
        decode: 40.0 + 90.0 * draws.next(),
        verify: 12.0 * draws.next(),
    };
    let correct = idx % 7 != 3;
    let verify = VerifyOutcome { run: branches, ..VerifyOutcome::default() };
    ProblemResult {
        id: format!("test-{idx:04}"),
        answer: Some(if correct { "84".into() } else { "48".to_string() }),
        correct: Some(correct),
        expected: Some("84".into()),
        winner: 0,
        latency_ms: phase_ms.prefill + phase_ms.decode + phase_ms.verify + 1.5 * draws.next(),
        phase_ms,
        tokens: TokenCounts { prefill: 900 + idx as u64, decode: 400, verify: 96, ..TokenCounts::default() },
        verify,
        blocks_peak: 90 + idx % 11,
        blocks_shared: 60,
        trials: TrialCounts::default(),
        branches: (0..branches)
            .map(|i| branch(i, if correct || i % 2 == 0 { "84" } else { "48" }, &mut draws))
            .collect(),
        similarity: None,
        tree: Vec::new(),
        memory: Vec::new(),
    }
}

/// A problem with everything recorded.
pub(crate) fn full(idx: usize, branches: usize) -> ProblemResult {
    let mut draws = Draws(1000 + idx as u64);
    let mut r = plain(idx, branches);
    for b in &mut r.branches {
        let mut entropy = 4.5 + draws.next();
        for layer in [2, 4, 5, 6, 7] {
            entropy *= 0.45 + 0.4 * draws.next();
            b.layers.push(LayerEntropy { layer, entropy, top1: 1.0 / (1.0 + entropy), yes: None });
            if entropy < 0.8 {
                b.exit_layer = Some(layer);
                break;
            }
        }
    }
    r.similarity = Some(similarity(3 + idx % 4, &mut draws));
    r.tree = tree();
    r.memory = memory(60 + 5 * idx, &mut draws);
    r
}

pub(crate) fn similarity(members: usize, draws: &mut Draws) -> SimilarityRecord {
    let mut below = vec![vec![0.0f32; members]; members];
    for (i, row) in below.iter_mut().enumerate() {
        for (j, value) in row[..i].iter_mut().enumerate() {
            let alike = f64::from(u8::from(i % 2 == j % 2));
            *value = (0.62 + 0.25 * alike + 0.1 * draws.next()) as f32;
        }
    }
    let value = |i: usize, j: usize| if i == j { 1.0 } else { below[i.max(j)][i.min(j)] };
    let pairwise = (0..members).map(|i| (0..members).map(|j| value(i, j)).collect()).collect();
    SimilarityRecord {
        members: (0..members).map(|i| format!("wording {i}")).collect(),
        to_root: (0..members).map(|_| (0.7 + 0.3 * draws.next()) as f32).collect(),
        pairwise,
        clusters: (0..members).map(|i| i % 2).collect(),
        tau: 0.85,
        depth: 2,
    }
}

/// Parent, depth, branch, end, answer.
type Row = (Option<usize>, usize, usize, NodeEnd, Option<&'static str>);

/// Three levels, every way to end.
pub(crate) fn tree() -> Vec<NodeResult> {
    use NodeEnd::*;
    let rows: [Row; 14] = [
        (None, 1, 0, Expanded, None),
        (None, 1, 1, Pruned, None),
        (None, 1, 2, Expanded, None),
        (None, 1, 3, Duplicate(0), None),
        (None, 1, 4, Aliased(2), None),
        (Some(0), 2, 0, Answered, Some("84")),
        (Some(0), 2, 1, Merged(5), None),
        (Some(0), 2, 2, Expanded, None),
        (Some(2), 2, 0, Length, None),
        (Some(2), 2, 1, Stopped, Some("48")),
        (Some(2), 2, 2, Failed, None),
        (Some(7), 3, 0, Answered, Some("84")),
        (Some(7), 3, 1, Pruned, None),
        (Some(7), 3, 2, Duplicate(11), Some("84")),
    ];
    let node = |(node, (parent, depth, branch, ended, answer)): (usize, Row)| NodeResult {
        node,
        parent,
        depth,
        branch,
        tokens: 8 + node,
        text: format!("Step {depth}: 40 + 44 = 84."),
        confidence: 0.99 - 0.03 * node as f64,
        score: (node % 3 != 0).then_some(0.5 + 0.01 * node as f64),
        answer: answer.map(str::to_string),
        ended,
    };
    rows.into_iter().enumerate().map(node).collect()
}

pub(crate) fn memory(steps: usize, draws: &mut Draws) -> Vec<MemorySample> {
    let mut freed = 0;
    (0..steps)
        .map(|step| {
            let open = if step < steps * 2 / 3 { 8 } else { 4 };
            freed += if step == steps * 2 / 3 { 14 } else { draws.below(20) as u64 / 18 };
            MemorySample { step, shared: 63, private: open * (1 + step / 16), cached: step / 25, freed }
        })
        .collect()
}
