//! Decisions on real statistics: the residual rows of CPU runs over 200 problems, probed by the CPU and by the emulated
//! kernels. Both decide the same, except where a statistic lies within 1e-3 of its threshold; such cases are counted.

mod common;

use common::{compiled, engine, model_file, path, problems, prompt_pack, read, run_all, tokenizer, uncached};
use rksc::DType;
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::batch::{AttentionPlan, SequenceView};
use rksc::gate::{self, Effect, GateSpec, Over, ProbeNorm, Rule, Scope, Seen, Statistic};
use rksc::kv::KvLayout;
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::solver::task::{Task, TextTask};

const PROBLEMS: usize = 200;
/// Distance from a threshold at which two devices may decide differently.
const NEAR: f32 = 1e-3;
const ALPHA: f32 = 1.5;
const BLOCK_SIZE: usize = 16;
const MAX_ROWS: usize = 4096;

// ---- recording -----------------------------------------------------------------------------------------------------

/// A layer's weights on the CPU, and its K and V.
struct Layer<B: Backend> {
    attn_norm: B::Buf,
    qkv: B::Matrix,
    o: B::Matrix,
    mlp_norm: B::Buf,
    gate_up: B::Matrix,
    down: B::Matrix,
    kv: (B::Buf, B::Buf),
}

/// Runs prompts through the bundled model op by op, as the engine does, and keeps the residual stream of their last rows.
struct Recorder {
    cpu: Cpu,
    config: ModelConfig,
    layout: KvLayout,
    embed: <Cpu as Backend>::Matrix,
    layers: Vec<Layer<Cpu>>,
    final_norm: Vec<f32>,
    inv_freq: <Cpu as Backend>::Buf,
    /// x, delta, qkv and gate_up in f32; h, q, o and act in the compute type.
    wide: [<Cpu as Backend>::Buf; 4],
    narrow: [<Cpu as Backend>::Buf; 4],
    lse: <Cpu as Backend>::Buf,
}

impl Recorder {
    fn new() -> Self {
        let config = ModelConfig::from_dir(&path(common::MODEL)).unwrap();
        let store = WeightStore::open(&path(common::MODEL)).unwrap();
        let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
        let c = &config;
        let (q_width, kv_width) = (c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let layout = KvLayout {
            num_blocks: 2 * MAX_ROWS / BLOCK_SIZE,
            num_kv_heads: c.num_kv_heads,
            block_size: BLOCK_SIZE,
            head_dim: c.head_dim,
            dtype: DType::Bf16,
        };
        let tensor = |name: &str, shape: &[usize]| store.get(name, shape).unwrap();
        let layers = (0..c.num_layers)
            .map(|idx| {
                let part =
                    |suffix: &str, shape: &[usize]| tensor(&format!("model.layers.{idx}.{suffix}.weight"), shape);
                let mut matrix = |parts: &[(&str, usize)], width: usize| {
                    let parts: Vec<_> =
                        parts.iter().map(|(suffix, rows)| part(suffix, &[*rows, width]).into()).collect();
                    cpu.matrix(&parts, DType::Bf16).unwrap()
                };
                let heads =
                    [("self_attn.q_proj", q_width), ("self_attn.k_proj", kv_width), ("self_attn.v_proj", kv_width)];
                let qkv = matrix(&heads, c.hidden);
                let o = matrix(&[("self_attn.o_proj", c.hidden)], q_width);
                let gate_up = matrix(&[("mlp.gate_proj", c.intermediate), ("mlp.up_proj", c.intermediate)], c.hidden);
                let down = matrix(&[("mlp.down_proj", c.hidden)], c.intermediate);
                let mut norm = |suffix: &str| cpu.vector(&[part(suffix, &[c.hidden])]).unwrap();
                let (attn_norm, mlp_norm) = (norm("input_layernorm"), norm("post_attention_layernorm"));
                let elems = layout.num_blocks * layout.block_elems();
                let kv = (cpu.alloc(DType::Bf16, elems).unwrap(), cpu.alloc(DType::Bf16, elems).unwrap());
                Layer { attn_norm, qkv, o, mlp_norm, gate_up, down, kv }
            })
            .collect();
        let embed = tensor("model.embed_tokens.weight", &[c.vocab_size, c.hidden]);
        let embed = cpu.matrix(&[embed.into()], DType::Bf16).unwrap();
        let norm = cpu.vector(&[tensor("model.norm.weight", &[c.hidden])]).unwrap();
        let mut final_norm = vec![0.0; c.hidden];
        cpu.read_f32(&norm, 0, &mut final_norm).unwrap();
        let inv_freq = cpu.upload(&c.rope.inv_freq(c.max_position_embeddings)).unwrap();
        let buffers = |dtype, widths: [usize; 4]| widths.map(|w| cpu.alloc(dtype, MAX_ROWS * w).unwrap());
        let wide = buffers(DType::F32, [c.hidden, c.hidden, q_width + 2 * kv_width, 2 * c.intermediate]);
        let narrow = buffers(DType::Bf16, [c.hidden, q_width, q_width, c.intermediate]);
        let lse = cpu.alloc(DType::F32, MAX_ROWS * c.num_q_heads).unwrap();
        Self { layout, embed, layers, final_norm, inv_freq, wide, narrow, lse, cpu, config }
    }

    /// `[layers][prompts, hidden]`
    fn record(&mut self, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
        let inputs = self.inputs(prompts);
        let last_rows = inputs.query_rows.clone();
        let num_rows = inputs.token_ids.len();
        assert!(num_rows <= MAX_ROWS, "{num_rows} rows");
        let inputs = self.cpu.stage(inputs).unwrap();
        let hidden = self.config.hidden;
        let [x, ..] = &mut self.wide;
        self.cpu.embed(Embed { table: &self.embed, inputs: &inputs, x, scale: 1.0, hidden }).unwrap();
        let mut recorded = Vec::new();
        for idx in 0..self.layers.len() {
            self.layer(idx, &inputs, num_rows);
            let mut of_layer = vec![0.0; last_rows.len() * hidden];
            for (row, dst) in last_rows.iter().zip(of_layer.chunks_mut(hidden)) {
                self.cpu.read_f32(&self.wide[0], *row as usize * hidden, dst).unwrap();
            }
            recorded.push(of_layer);
        }
        recorded
    }

    /// Every prompt in blocks of its own.
    fn inputs(&self, prompts: &[Vec<u32>]) -> PassInputs {
        let mut inputs = PassInputs::default();
        let mut tables: Vec<Vec<u32>> = Vec::new();
        let mut next_block = 0;
        for prompt in prompts {
            let end = next_block + prompt.len().div_ceil(BLOCK_SIZE) as u32;
            tables.push((next_block..end).collect());
            inputs.token_ids.extend(prompt);
            inputs.positions.extend(0..prompt.len() as u32);
            inputs.slots.extend((0..prompt.len() as u32).map(|i| next_block * BLOCK_SIZE as u32 + i));
            inputs.query_rows.push(inputs.token_ids.len() as u32 - 1);
            next_block = end;
        }
        assert!(next_block as usize <= self.layout.num_blocks);
        let mut start = 0;
        let views: Vec<SequenceView<'_>> = prompts
            .iter()
            .zip(&tables)
            .map(|(prompt, blocks)| {
                let rows = start..start + prompt.len();
                start = rows.end;
                SequenceView { rows, blocks, kv_len: prompt.len() }
            })
            .collect();
        let max_group_rows = self.cpu.max_group_rows(self.config.num_q_heads / self.config.num_kv_heads);
        inputs.plan = AttentionPlan::new(&views, BLOCK_SIZE, max_group_rows);
        inputs
    }

    /// One decoder layer; the residual stream has its output when it returns.
    fn layer(&mut self, idx: usize, inputs: &PassInputs, num_rows: usize) {
        let Self { cpu, config, layout, inv_freq, lse, .. } = self;
        let ([x, delta, qkv, gate_up], [h, q, o, act]) = (&mut self.wide, &mut self.narrow);
        let w = &mut self.layers[idx];
        let (k_cache, v_cache) = (&mut w.kv.0, &mut w.kv.1);
        let (rows, hidden, eps) = (0..num_rows, config.hidden, config.rms_norm_eps);
        macro_rules! norm {
            ($delta:expr, $output:expr) => {{
                let (delta, output) = ($delta, $output);
                let rows = rows.clone();
                cpu.add_rms_norm(AddRmsNorm {
                    rows,
                    x,
                    delta,
                    post_norm: None,
                    output,
                    y: h,
                    keep: None,
                    step_similarity: None,
                    hidden,
                    eps,
                })
                .unwrap();
            }};
        }
        macro_rules! linear {
            ($x:expr, $w:expr, $y:expr) => {
                cpu.linear(Linear { rows: rows.clone(), x: $x, w: &$w, river: None, bias: None, y: $y }).unwrap()
            };
        }
        norm!(None, NormOutput::Normed(&w.attn_norm));
        linear!(h, w.qkv, qkv);
        let rope = RopeAppend {
            rows: rows.clone(),
            inputs,
            qkv,
            q,
            query_ring: None,
            k_cache,
            v_cache,
            inv_freq,
            rotary_dim: layout.head_dim,
            rope_scale: 1.0,
            qk_norm: None,
            num_q_heads: config.num_q_heads,
            layout,
        };
        cpu.rope_append(rope).unwrap();
        let (num_q_heads, sm_scale) = (config.num_q_heads, config.sm_scale);
        let (window, softcap) = (None, None);
        let attention =
            PagedAttention { inputs, q, k_cache, v_cache, o, lse, num_q_heads, sm_scale, window, softcap, layout };
        cpu.paged_attention(attention).unwrap();
        linear!(o, w.o, delta);
        norm!(Some(&*delta), NormOutput::Normed(&w.mlp_norm));
        linear!(h, w.gate_up, gate_up);
        let intermediate = config.intermediate;
        let activation = Activation::Silu;
        cpu.glu(Glu { rows: rows.clone(), gate_up, y: act, intermediate, activation }).unwrap();
        linear!(act, w.down, delta);
        norm!(Some(&*delta), NormOutput::None);
    }
}

// ---- probes on either device ---------------------------------------------------------------------------------------

/// A device that is asked about recorded rows.
struct Asked<B: Backend> {
    backend: B,
    unembedding: B::Matrix,
    final_norm: B::Buf,
    hidden: usize,
    eps: f32,
}

impl<B: Backend> Asked<B> {
    fn new(mut backend: B, recorder: &Recorder) -> Self {
        let c = &recorder.config;
        let store = WeightStore::open(&path(common::MODEL)).unwrap();
        let embed = store.get("model.embed_tokens.weight", &[c.vocab_size, c.hidden]).unwrap();
        let unembedding = backend.matrix(&[embed.into()], DType::Bf16).unwrap();
        let final_norm = backend.upload(&recorder.final_norm).unwrap();
        Self { backend, unembedding, final_norm, hidden: c.hidden, eps: c.rms_norm_eps }
    }

    fn entropies(&mut self, rows: &[f32], norm: ProbeNorm, candidates: Option<&[u32]>) -> Vec<RowStats> {
        let num_rows = rows.len() / self.hidden;
        let x = self.backend.upload(rows).unwrap();
        let probe = EntropyProbe {
            x: &x,
            num_rows,
            norm: (norm == ProbeNorm::Final).then_some(&self.final_norm),
            eps: self.eps,
            w: &self.unembedding,
            candidates,
            hidden: self.hidden,
        };
        self.backend.entropy_probe(probe).unwrap();
        let mut stats = vec![RowStats::default(); num_rows];
        self.backend.read_stats(&mut stats).unwrap();
        stats
    }

    /// `states` is `[layers][members, hidden]`; the first member is the root.
    fn compare(&mut self, states: &[Vec<f32>], layer_weights: &[f32], tau: f32) -> Similarity {
        let root: Vec<f32> = states.iter().flat_map(|layer| layer[..self.hidden].to_vec()).collect();
        let (root, all) = (self.backend.upload(&root).unwrap(), self.backend.upload(&states.concat()).unwrap());
        let mut similarity = Similarity::default();
        let compare = BranchSimilarity {
            states: &all,
            root: &root,
            layer_weights,
            num_branches: states[0].len() / self.hidden,
            hidden: self.hidden,
            tau,
            similarity: &mut similarity,
        };
        self.backend.branch_similarity(compare).unwrap();
        similarity
    }
}

fn asked(recorder: &Recorder) -> (Asked<Cpu>, Asked<Cuda>) {
    let c = &recorder.config;
    let heads = Heads { num_q_heads: c.num_q_heads, num_kv_heads: c.num_kv_heads, block_size: BLOCK_SIZE };
    let cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    let emulated = Cuda::new(Device::emulated().unwrap(), heads);
    (Asked::new(cpu, recorder), Asked::new(emulated, recorder))
}

// ---- prompts -------------------------------------------------------------------------------------------------------

struct Prompts {
    /// The question in each of its wordings.
    wordings: Vec<Vec<u32>>,
    /// What the first branches append to the first.
    branches: Vec<Vec<u32>>,
    /// Verification of the right answer and of a wrong one, each prompt standing alone.
    verdicts: Vec<Vec<u32>>,
}

/// The prompts of the problems, and the tokens of YES and NO, ascending.
fn prompts() -> (Vec<Prompts>, Vec<u32>) {
    let (pack, tokenizer) = (compiled(prompt_pack(), ""), tokenizer());
    let file = read(&model_file("problems/dev.jsonl"));
    let mut verdict_tokens = Vec::new();
    let all = problems("dev", PROBLEMS).into_iter().zip(file.lines()).map(|(problem, line)| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let steps = line["gold_steps"].as_array().unwrap();
        let answer = line["answer"].as_i64().unwrap();
        let solution = |answer: i64| {
            let steps = steps.iter().enumerate().map(|(i, s)| match i {
                0 => format!(" {}", s.as_str().unwrap()),
                _ => format!("\nStep {}: {}", i + 1, s.as_str().unwrap()),
            });
            tokenizer.encode(&format!("{}\nThe answer is {answer}.", steps.collect::<String>())).unwrap()
        };
        let task = TextTask::new(pack.clone(), problem).unwrap();
        let (yes, no) = task.verdict_tokens();
        verdict_tokens = [yes, no].concat();
        verdict_tokens.sort_unstable();
        Prompts {
            wordings: (0..task.num_wordings()).map(|w| task.wording(w).unwrap().to_vec()).collect(),
            branches: (0..4).map(|b| common::branch_prompt(&task, b)).collect(),
            verdicts: [answer, answer + 1].iter().map(|&a| task.verify_fresh(&solution(a)).unwrap()).collect(),
        }
    });
    (all.collect(), verdict_tokens)
}

/// Decisions taken, those that differ between the devices, and those with a statistic near its threshold.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    decisions: usize,
    near: usize,
    differ: usize,
}

impl Tally {
    /// Two devices decided `same`ly or not, `near` a threshold or not.
    fn count(&mut self, same: bool, near: bool, what: impl Fn() -> String) {
        self.decisions += 1;
        self.near += usize::from(near);
        self.differ += usize::from(!same);
        assert!(same || near, "{}: they differ away from any threshold", what());
    }
}

// ---- tests ---------------------------------------------------------------------------------------------------------

/// The rows recorded here are those that the engine's own probes see: the same bits.
#[test]
fn recorded_rows_are_the_engines_own() {
    let mut recorder = Recorder::new();
    let (mut cpu, _) = asked(&recorder);
    let (prompts, _) = prompts();
    let num_layers = recorder.config.num_layers;
    let layers: Vec<u32> = (1..=num_layers as u32).collect();
    for p in &prompts[..3] {
        let states = recorder.record(&p.wordings);
        let observe = |statistic| GateSpec {
            layers: layers.clone(),
            statistic,
            rule: Rule::Never,
            scope: Scope::Sequence,
            effect: Effect::Observe,
        };
        let mut engine = engine(|_| ());
        let mut run = |statistic| {
            let branches: Vec<_> = p.wordings.iter().map(|w| engine.prefill(w, uncached()).unwrap()).collect();
            engine.gate(&observe(statistic), &branches).unwrap();
            run_all(&mut engine);
            let similarity = engine.similarity(branches[0]).unwrap().map(|s| s.similarity.clone());
            let row = |&b| engine.row(b).unwrap().unwrap().layers.clone();
            (similarity, branches.iter().map(row).collect::<Vec<_>>())
        };
        let (similarity, _) = run(Statistic::BranchSimilarity { alpha: ALPHA });
        let weights = gate::layer_weights(ALPHA, &layers, num_layers);
        assert_eq!(similarity.unwrap(), cpu.compare(&states, &weights, f32::INFINITY));
        for norm in [ProbeNorm::Final, ProbeNorm::Raw] {
            let (_, rows) = run(Statistic::Entropy { over: Over::Vocabulary, norm, stacked: 1 });
            for (layer, states) in states.iter().enumerate() {
                let stats = cpu.entropies(states, norm, None);
                assert!(rows.iter().zip(&stats).all(|(row, stats)| row[layer].stats == *stats), "layer {layer}");
            }
        }
    }
}

#[test]
fn branch_similarity_decides_alike_on_both_devices() {
    let mut recorder = Recorder::new();
    let (mut cpu, mut emulated) = asked(&recorder);
    let num_layers = recorder.config.num_layers;
    let (prompts, _) = prompts();
    let taus: Vec<f32> = (50..100).map(|percent| percent as f32 / 100.0).collect();
    let (mut pairs, mut clusters, mut largest) = (Tally::default(), Tally::default(), 0.0f32);
    // The wordings of a question, its branches, and questions that have nothing in common but their form.
    let roots: Vec<Vec<u32>> = prompts.iter().map(|p| p.wordings[0].clone()).collect();
    let groups = prompts.iter().flat_map(|p| [&p.wordings[..], &p.branches]).chain(roots.chunks(8));
    for group in groups {
        let states = recorder.record(group);
        for depth in [1, 2, 4, num_layers] {
            let layers: Vec<u32> = (1..=depth as u32).collect();
            let weights = gate::layer_weights(ALPHA, &layers, num_layers);
            let states = &states[..depth];
            let (want, got) = (cpu.compare(states, &weights, 0.8), emulated.compare(states, &weights, 0.8));
            let n = group.len();
            // Each pair once.
            let pairs_of = |s: &Similarity| -> Vec<f32> {
                (0..n).flat_map(|b| s.pairwise[b * n..b * n + b].to_vec()).chain(s.to_root.clone()).collect()
            };
            let (on_cpu, on_device) = (pairs_of(&want), pairs_of(&got));
            let both = || on_cpu.iter().zip(&on_device);
            largest = both().fold(largest, |largest, (w, g)| largest.max((w - g).abs()));
            for &tau in &taus {
                for (w, g) in both() {
                    pairs.count((*w >= tau) == (*g >= tau), (w - tau).abs() < NEAR, || format!("{w} {g} at {tau}"));
                }
                let (on_cpu, on_device) = (gate::cluster(&want.pairwise, n, tau), gate::cluster(&got.pairwise, n, tau));
                let near_tau = want.pairwise.iter().any(|s| (s - tau).abs() < NEAR);
                clusters.count(on_cpu == on_device, near_tau || is_tied(&want.pairwise, n), || {
                    format!("{want:?} {got:?} at {tau}")
                });
            }
            // What the kernel made of its own numbers.
            assert_eq!(got.labels, gate::cluster(&got.pairwise, n, 0.8));
        }
    }
    println!("pairs: {pairs:?}; clusters: {clusters:?}; largest difference of a similarity {largest:e}");
    assert!(largest < 1e-5 && pairs.decisions > 500_000 && pairs.near > 0 && clusters.near > 0, "{largest} {pairs:?}");
}

/// Two branches are equally central but for rounding: then it may make either the representative.
fn is_tied(pairwise: &[f32], n: usize) -> bool {
    let mut sums: Vec<f32> = pairwise.chunks(n).map(|row| row.iter().sum()).collect();
    sums.sort_by(f32::total_cmp);
    sums.windows(2).any(|pair| pair[1] - pair[0] < NEAR)
}

/// What a probe is taken over, and the bounds tried on it.
struct Probed<'a> {
    name: &'a str,
    norm: ProbeNorm,
    candidates: Option<&'a [u32]>,
    thetas: &'a [f32],
    epsilons: &'a [f32],
}

#[test]
fn entropy_probe_decides_alike_on_both_devices() {
    let mut recorder = Recorder::new();
    let (mut cpu, mut emulated) = asked(&recorder);
    let num_layers = recorder.config.num_layers;
    let (prompts, verdict_tokens) = prompts();
    let (nats, bits) =
        ([0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0], [0.01, 0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.68]);
    let (steps, small_steps) = ([0.1, 0.4, 1.0, 3.0], [0.005, 0.02, 0.1, 0.4]);
    let vocabulary = |name, norm| Probed { name, norm, candidates: None, thetas: &nats, epsilons: &steps };
    let verdict =
        |name, norm| Probed { name, norm, candidates: Some(&verdict_tokens), thetas: &bits, epsilons: &small_steps };
    let probes = [
        vocabulary("vocabulary, final norm", ProbeNorm::Final),
        vocabulary("vocabulary, raw", ProbeNorm::Raw),
        verdict("yes and no, final norm", ProbeNorm::Final),
        verdict("yes and no, raw", ProbeNorm::Raw),
    ];
    let mut tallies = [(Tally::default(), 0.0f32); 4];
    for p in &prompts {
        let states = recorder.record(&p.verdicts).concat();
        let num_seqs = p.verdicts.len();
        for (probe, (tally, largest)) in probes.iter().zip(&mut tallies) {
            let want = cpu.entropies(&states, probe.norm, probe.candidates);
            let got = emulated.entropies(&states, probe.norm, probe.candidates);
            // Per sequence, layer by layer.
            let of = |stats: &[RowStats], seq: usize| -> Vec<f32> {
                (0..num_layers).map(|layer| stats[layer * num_seqs + seq].entropy).collect()
            };
            for seq in 0..num_seqs {
                let (want, got) = (of(&want, seq), of(&got, seq));
                *largest = want.iter().zip(&got).fold(*largest, |largest, (w, g)| largest.max((w - g).abs()));
                for (&theta, &epsilon) in probe.thetas.iter().flat_map(|t| probe.epsilons.iter().map(move |e| (t, e))) {
                    let spec = GateSpec {
                        layers: (1..=num_layers as u32).collect(),
                        statistic: Statistic::Entropy { over: Over::Vocabulary, norm: probe.norm, stacked: 1 },
                        rule: Rule::Settled { theta, epsilon },
                        scope: Scope::Sequence,
                        effect: Effect::Stop,
                    };
                    for depth in 2..=num_layers {
                        let decide = |values: &[f32]| spec.decide(&[Seen { row: 0, values: &values[..depth] }])[0];
                        let (last, before) = (want[depth - 1], want[depth - 2]);
                        let near = (last - theta).abs() < NEAR || ((last - before).abs() - epsilon).abs() < NEAR;
                        tally.count(decide(&want) == decide(&got), near, || {
                            format!("{} theta {theta} epsilon {epsilon}: {want:?} {got:?}", probe.name)
                        });
                    }
                }
            }
        }
    }
    for (probe, (tally, largest)) in probes.iter().zip(&tallies) {
        println!("{}: {tally:?}, largest difference of an entropy {largest:e}", probe.name);
        assert!(*largest < 2e-2 && tally.decisions > 50_000 && tally.near > 0, "{}: {largest} {tally:?}", probe.name);
    }
}
