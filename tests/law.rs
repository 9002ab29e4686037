//! The law of bits on whole passes, per SIMD level and compute type: a branch's rows depend on its own tokens alone -
//! not on chunks, on company, on who shares its blocks, on preemption, on the number of threads.

mod common;

use common::*;
use rksc::engine::{BranchId, Engine, GenerateParams, PrefillOptions};
use rksc::sampler::SamplingParams;
use rksc::{DType, EngineConfig};

/// Greedy steps compared behind every prompt.
const STEPS: usize = 4;

/// One SIMD level and compute type, and prompts that cross block and attention-tile borders.
struct Lab {
    simd: String,
    dtype: DType,
    prompt: Vec<u32>,
    others: Vec<Vec<u32>>,
}

impl Lab {
    fn new(simd: &str, dtype: DType) -> Self {
        let tasks = tasks(&problems("dev", 17), "");
        let prefix = tokenizer().encode(&format!("<|bos|>{}", fewshot_prefix())).unwrap();
        let whole = branch_prompt(tasks[16].as_ref(), 3);
        // A piece of the few-shot examples in front, the problem's beginning left out: three attention tiles of 64.
        let prompt = [&prefix[..75], &whole[whole.len() - 61..]].concat();
        let mut others: Vec<Vec<u32>> = (0..16).map(|i| branch_prompt(tasks[i].as_ref(), i % 8)).collect();
        for (i, other) in others.iter_mut().enumerate() {
            other.truncate([1, 15, 16, 17, 31, 33, 48, 64][i % 8] + i / 8 * 8);
        }
        others[9] = prompt[..64].to_vec();
        Self { simd: simd.into(), dtype, prompt, others }
    }

    fn engine(&self, change: impl FnOnce(&mut EngineConfig)) -> Engine {
        engine(|c| {
            c.simd = self.simd.clone();
            c.dtype = self.dtype;
            change(c);
        })
    }

    fn plain(&self) -> Engine {
        self.engine(|_| {})
    }

    /// A root that will say everything about its last row and about `STEPS` greedy steps.
    fn root(&self, engine: &mut Engine, tokens: &[u32]) -> BranchId {
        let branch = engine.prefill(tokens, uncached()).unwrap();
        listen(engine, branch);
        branch
    }

    /// The rows of `tokens` computed in one piece, alone, on one thread.
    fn alone(&self, tokens: &[u32]) -> Trace {
        let mut engine = self.plain();
        let branch = self.root(&mut engine, tokens);
        one(traces(&mut engine, &[branch]))
    }

    fn check(&self, what: &str, got: &Trace, expected: &Trace) {
        assert_eq!(got.len(), expected.len(), "{}, {}: {what}: rows", self.simd, self.dtype);
        for (row, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert_eq!(got.len(), expected.len());
            if let Some(i) = (0..got.len()).find(|&i| got[i] != expected[i]) {
                panic!(
                    "{}, {}: {what}: row {row} behind the prompt differs at value {i}: {:e} is not {:e}",
                    self.simd,
                    self.dtype,
                    f32::from_bits(got[i]),
                    f32::from_bits(expected[i])
                );
            }
        }
    }
}

fn listen(engine: &mut Engine, branch: BranchId) {
    let ids = all_ids(engine);
    engine.watch(branch, &ids, 0).unwrap();
    engine.start(branch, greedy(STEPS)).unwrap();
}

fn one(mut traces: Vec<Trace>) -> Trace {
    traces.swap_remove(0)
}

/// Runs `check` in every lab of this CPU.
fn in_every_lab(check: impl Fn(&Lab)) {
    for simd in simd_levels() {
        for dtype in [DType::F32, DType::Bf16] {
            check(&Lab::new(&simd, dtype));
        }
    }
}

#[test]
fn chunks_do_not_change_a_row() {
    in_every_lab(|lab| {
        let whole = lab.alone(&lab.prompt);
        assert_eq!(whole.len(), STEPS);
        for size in [1, 7, 64] {
            let mut engine = lab.engine(|c| c.max_batch_tokens = size);
            let branch = lab.root(&mut engine, &lab.prompt);
            lab.check(&format!("chunks of {size}"), &one(traces(&mut engine, &[branch])), &whole);
        }
        let mut engine = lab.plain();
        let mut pieces = lab.prompt.chunks(11);
        let branch = engine.prefill(pieces.next().unwrap(), uncached()).unwrap();
        for piece in pieces {
            run_all(&mut engine);
            engine.append(branch, piece).unwrap();
        }
        listen(&mut engine, branch);
        lab.check("appended by 11", &one(traces(&mut engine, &[branch])), &whole);
    });
}

#[test]
fn company_does_not_change_a_row() {
    in_every_lab(|lab| {
        let alone = lab.alone(&lab.prompt);
        for place in [0, 9] {
            let mut engine = lab.engine(|c| c.max_batch_tokens = 700);
            let mut subject = None;
            for (i, other) in lab.others.iter().enumerate() {
                if i == place {
                    subject = Some(lab.root(&mut engine, &lab.prompt));
                }
                let branch = engine.prefill(other, uncached()).unwrap();
                engine.start(branch, greedy(STEPS + i % 3)).unwrap();
            }
            let subject = subject.unwrap_or_else(|| lab.root(&mut engine, &lab.prompt));
            let got = one(traces(&mut engine, &[subject]));
            lab.check(&format!("as number {place} among 16 others"), &got, &alone);
        }
    });
}

#[test]
fn company_that_comes_and_goes_does_not_change_a_row() {
    in_every_lab(|lab| {
        let alone = lab.alone(&lab.prompt);
        let mut engine = lab.plain();
        let subject = lab.root(&mut engine, &lab.prompt);
        let mut rows = Trace::new();
        for other in &lab.others[..STEPS] {
            let guest = engine.prefill(other, uncached()).unwrap();
            engine.step().unwrap();
            rows.push(row_bits(&engine, subject));
            engine.prune(guest).unwrap();
        }
        lab.check("with a new guest at each step", &rows, &alone);
    });
}

#[test]
fn sharing_does_not_change_a_row() {
    in_every_lab(|lab| {
        let borders = [16, 64, 75, lab.prompt.len() - 1];
        let tails: Vec<Vec<u32>> = borders.iter().map(|&at| lab.prompt[at..].to_vec()).collect();
        let alone = lab.alone(&lab.prompt);
        for (at, tail) in borders.into_iter().zip(&tails) {
            // The root is computed first, or in the same pass; beside a sibling that writes the same shared tail block.
            for together in [false, true] {
                let mut engine = lab.plain();
                let root = engine.prefill(&lab.prompt[..at], uncached()).unwrap();
                if !together {
                    run_all(&mut engine);
                }
                let sibling = fork(&mut engine, root);
                engine.append(sibling, &lab.others[0]).unwrap();
                engine.start(sibling, greedy(STEPS)).unwrap();
                let child = fork(&mut engine, root);
                engine.append(child, tail).unwrap();
                listen(&mut engine, child);
                let got = one(traces(&mut engine, &[child]));
                lab.check(&format!("forked at {at}, same pass {together}"), &got, &alone);
            }
        }
        // Found in the prefix cache.
        let mut engine = lab.plain();
        for round in 0..2 {
            let branch = engine.prefill(&lab.prompt, PrefillOptions::default()).unwrap();
            listen(&mut engine, branch);
            lab.check(&format!("prefix cache, round {round}"), &one(traces(&mut engine, &[branch])), &alone);
            engine.prune(branch).unwrap();
        }
        let found = engine.engine_stats().tokens_from_cache as usize;
        assert_eq!(found, (lab.prompt.len() - 1) / 16 * 16, "the second round did not use the cache");
    });
}

#[test]
fn eight_forks_packed_with_their_root_equal_eight_separate_runs() {
    in_every_lab(|lab| {
        let suffixes: Vec<&[u32]> = (0..8).map(|i| &lab.others[i + 8][1.min(lab.others[i + 8].len() - 1)..]).collect();
        let mut engine = lab.plain();
        let root = engine.prefill(&lab.prompt, uncached()).unwrap();
        let children: Vec<BranchId> = suffixes
            .iter()
            .map(|suffix| {
                let child = fork(&mut engine, root);
                engine.append(child, suffix).unwrap();
                listen(&mut engine, child);
                child
            })
            .collect();
        let first = engine.step().unwrap();
        assert_eq!(first.items.len(), 9, "the root and its forks run in one pass");
        let rows = |engine: &Engine| -> Vec<Trace> { children.iter().map(|&c| vec![row_bits(engine, c)]).collect() };
        let mut packed = rows(&engine);
        while engine.next_event().is_some() {}
        for (all, rest) in packed.iter_mut().zip(traces(&mut engine, &children)) {
            all.extend(rest);
        }
        for (i, (got, suffix)) in packed.iter().zip(&suffixes).enumerate() {
            let alone = lab.alone(&[&lab.prompt[..], suffix].concat());
            lab.check(&format!("fork {i} of 8"), got, &alone);
        }
    });
}

/// `n` branches of `prompts`, each generating `steps` tokens while everything about them is recorded.
fn crowd(engine: &mut Engine, prompts: &[Vec<u32>], params: &GenerateParams) -> Vec<BranchId> {
    let ids = all_ids(engine);
    prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| {
            let options = PrefillOptions { path: i as u64, ..uncached() };
            let branch = engine.prefill(prompt, options).unwrap();
            engine.watch(branch, &ids, 0).unwrap();
            engine.start(branch, params.clone()).unwrap();
            branch
        })
        .collect()
}

fn blocks_memory(lab: &Lab, blocks: u64) -> u64 {
    let engine = lab.plain();
    blocks * engine.info().kv_bytes_per_token * engine.config().block_size as u64
}

#[test]
fn preemption_and_threads_do_not_change_a_row() {
    in_every_lab(|lab| {
        let prompts: Vec<Vec<u32>> = lab.others[10..16].to_vec();
        let params = greedy(24);
        let mut roomy = lab.plain();
        let branches = crowd(&mut roomy, &prompts, &params);
        let expected = traces(&mut roomy, &branches);
        assert_eq!(roomy.engine_stats().preemptions, 0);

        let largest = prompts.iter().map(Vec::len).max().unwrap() + 24;
        let memory = blocks_memory(lab, largest.div_ceil(16) as u64 + 3);
        for threads in [1, 2, 3] {
            let mut tight = lab.engine(|c| (c.kv_cache_memory, c.threads) = (Some(memory), threads));
            let branches = crowd(&mut tight, &prompts, &params);
            let got = traces(&mut tight, &branches);
            let preempted = tight.engine_stats().preemptions;
            assert!(preempted > 0, "the pool was not tight");
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                lab.check(&format!("branch {i}, {preempted} preemptions, {threads} threads"), got, expected);
            }
        }
        let mut roomy = lab.engine(|c| c.threads = 3);
        let branches = crowd(&mut roomy, &prompts, &params);
        for (i, (got, expected)) in traces(&mut roomy, &branches).iter().zip(&expected).enumerate() {
            lab.check(&format!("branch {i}, 3 threads"), got, expected);
        }
    });
}

#[test]
fn draws_depend_on_the_branch_alone() {
    in_every_lab(|lab| {
        let sampling = SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() };
        let params = GenerateParams { sampling, ..greedy(24) };
        let prompts: Vec<Vec<u32>> = lab.others[10..16].to_vec();
        let mut together = lab.plain();
        let branches = crowd(&mut together, &prompts, &params);
        run_all(&mut together);
        let tokens = |engine: &Engine, b: BranchId| engine.tokens(b).unwrap().to_vec();
        let expected: Vec<Vec<u32>> = branches.iter().map(|&b| tokens(&together, b)).collect();

        for (i, prompt) in prompts.iter().enumerate() {
            let mut engine = lab.plain();
            let options = PrefillOptions { path: i as u64, ..uncached() };
            let branch = engine.prefill(prompt, options).unwrap();
            engine.start(branch, params.clone()).unwrap();
            run_all(&mut engine);
            assert_eq!(tokens(&engine, branch), expected[i], "{}, {}: branch {i} alone", lab.simd, lab.dtype);
        }

        let largest = expected.iter().map(Vec::len).max().unwrap();
        let memory = blocks_memory(lab, largest.div_ceil(16) as u64 + 3);
        let mut tight = lab.engine(|c| c.kv_cache_memory = Some(memory));
        let branches = crowd(&mut tight, &prompts, &params);
        run_all(&mut tight);
        assert!(tight.engine_stats().preemptions > 0, "the pool was not tight");
        for (i, &b) in branches.iter().enumerate() {
            assert_eq!(tokens(&tight, b), expected[i], "{}, {}: branch {i} preempted", lab.simd, lab.dtype);
        }

        // The draws are draws: another seed or path says something else somewhere.
        let texts = |seed: u64, path: u64| -> Vec<Vec<u32>> {
            let sampling = SamplingParams { temperature: 1.5, seed, ..SamplingParams::default() };
            let mut engine = lab.plain();
            let branches: Vec<BranchId> = prompts
                .iter()
                .map(|prompt| {
                    let branch = engine.prefill(prompt, PrefillOptions { path, ..uncached() }).unwrap();
                    engine.start(branch, GenerateParams { sampling: sampling.clone(), ..greedy(24) }).unwrap();
                    branch
                })
                .collect();
            run_all(&mut engine);
            branches.iter().map(|&b| tokens(&engine, b)).collect()
        };
        let base = texts(1, 0);
        assert_eq!(base, texts(1, 0));
        assert_ne!(base, texts(2, 0), "the seed does nothing");
        assert_ne!(base, texts(1, 1), "the path does nothing");
    });
}
