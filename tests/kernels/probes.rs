//! The probes through the [`Backend`] trait: `Cuda`, emulated and on a GPU where there is one, gives what `Cpu` gives.

use half::{bf16, f16};
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::testing::fill::Fill;
use rksc::testing::{round_to, tensor};
use rksc::{DType, Error, Result};

use crate::attention::{World, shape};
use crate::cuda_branch_similarity::Case;
use crate::device::DTYPES;

fn cpu() -> Cpu {
    Cpu::new(2, SimdLevel::detect()).unwrap()
}

fn cuda(device: Device, num_q_heads: usize, num_kv_heads: usize) -> Cuda {
    Cuda::new(device, Heads { num_q_heads, num_kv_heads, block_size: 16 })
}

/// The emulated device, and a GPU where there is one.
fn devices() -> Vec<Device> {
    [Device::emulated(), Device::gpu(0)].into_iter().flatten().collect()
}

// ---- entropy_probe -------------------------------------------------------------------------------------------------

struct Probe {
    hidden: usize,
    vocab: usize,
    dtype: DType,
    x: Vec<f32>,
    norm: Option<Vec<f32>>,
    w: Vec<f32>,
    candidates: Option<Vec<u32>>,
}

impl Probe {
    fn new(rows: usize, hidden: usize, vocab: usize, dtype: DType, candidates: usize) -> Self {
        let mut fill = Fill::new((rows * 31 + hidden * 7 + vocab) as u64);
        let x = round_to(&fill.normals(rows * hidden, 2.0), dtype);
        let norm = (rows.is_multiple_of(2)).then(|| fill.normals(hidden, 0.2).iter().map(|w| 1.0 + w).collect());
        let w = round_to(&fill.normals(vocab * hidden, 2.0 / (hidden as f32).sqrt()), dtype);
        let mut ids = fill.shuffled(vocab);
        ids.truncate(candidates);
        ids.sort_unstable();
        Self { hidden, vocab, dtype, x, norm, w, candidates: (candidates > 0).then_some(ids) }
    }

    fn run<B: Backend>(&self, b: &mut B) -> Result<(Vec<RowStats>, Counters)> {
        let num_rows = self.x.len() / self.hidden;
        let x = b.upload(&self.x)?;
        let norm = self.norm.as_ref().map(|n| b.upload(n)).transpose()?;
        let w = b.matrix(&[tensor("w", self.dtype, &[self.vocab, self.hidden], &self.w).into()], self.dtype)?;
        b.reset_counters();
        b.entropy_probe(EntropyProbe {
            x: &x,
            num_rows,
            norm: norm.as_ref(),
            eps: 1e-6,
            w: &w,
            candidates: self.candidates.as_deref(),
            hidden: self.hidden,
        })?;
        let mut stats = vec![RowStats::default(); num_rows];
        b.read_stats(&mut stats)?;
        Ok((stats, b.counters()))
    }
}

#[test]
fn entropy_probe_is_the_same_on_both_backends() {
    for device in devices() {
        let (mut cpu, mut cuda) = (cpu(), cuda(device, 1, 1));
        for (i, (rows, hidden, vocab, candidates)) in [
            (1, 8, 2, 0),
            (2, 64, 300, 0),
            (3, 64, 300, 2),
            (8, 192, 512, 0),
            (8, 192, 512, 2),
            (17, 128, 700, 0),
            (4, 128, 700, 1),
            (70, 64, 280, 0),
            (5, 896, 4100, 33),
            (2, 8, 50_257, 0),
            (3, 16, 152_064, 0),
            (3, 16, 152_064, 1000),
        ]
        .into_iter()
        .enumerate()
        {
            let dtype = DTYPES[i % 3];
            let probe = Probe::new(rows, hidden, vocab, dtype, candidates);
            let what = format!("entropy_probe {dtype} {rows}x{hidden}x{vocab}, {candidates} candidates");
            let ((want, on_cpu), (got, on_cuda)) = (probe.run(&mut cpu).unwrap(), probe.run(&mut cuda).unwrap());
            assert_eq!(on_cpu, on_cuda, "{what}");
            let outputs = probe.candidates.as_ref().map_or(vocab, Vec::len);
            let weight_bytes = (outputs * hidden * dtype.size_bytes()) as u64;
            let counted = Counters { launches: 1, read_backs: 1, weight_bytes, ..Counters::default() };
            assert_eq!(on_cpu, counted, "{what}");
            let tol = match (dtype, &probe.norm) {
                (DType::F32, _) | (_, None) => 4e-5,
                (DType::F16, _) => 4e-3,
                (DType::Bf16, _) => 3e-2,
            };
            for (row, (g, w)) in got.iter().zip(&want).enumerate() {
                let what = format!("{what}, row {row}: {g:?} {w:?}");
                assert_eq!((g.finite, w.finite), (1, 1), "{what}");
                assert!(g.argmax == w.argmax || w.margin < 2.0 * tol, "{what}");
                for (g, w) in [(g.max, w.max), (g.lse, w.lse), (g.top1, w.top1), (g.margin, w.margin)] {
                    assert!((g - w).abs() <= tol * (1.0 + w.abs()), "{what}");
                }
                assert!((g.entropy - w.entropy).abs() <= 2.0 * tol * (1.0 + w.entropy), "{what}");
            }
        }
    }
}

#[test]
fn both_backends_refuse_the_same_candidates() {
    let mut probe = Probe::new(2, 8, 2000, DType::F32, 0);
    let mut cuda = cuda(Device::emulated().unwrap(), 1, 1);
    for bad in [vec![], vec![2000], vec![4, 4], vec![4, 1]] {
        probe.candidates = Some(bad);
        for refused in [probe.run(&mut cpu()), probe.run(&mut cuda)] {
            assert!(matches!(refused, Err(Error::Shape { op: "entropy_probe", .. })), "{refused:?}");
        }
    }
    probe.candidates = Some((0..1025).collect());
    assert!(probe.run(&mut cpu()).is_ok());
    let refused = probe.run(&mut cuda).unwrap_err().to_string();
    assert!(refused.contains("1025 candidates") && refused.contains("1024"), "{refused}");
    probe.candidates = None;
    assert!(probe.run(&mut cuda).is_ok());
}

// ---- branch_similarity ---------------------------------------------------------------------------------------------

fn compare<B: Backend>(b: &mut B, case: &Case) -> Result<(Similarity, Counters)> {
    let (states, root) = (b.upload(&case.states)?, b.upload(&case.root)?);
    let mut similarity = Similarity::default();
    b.reset_counters();
    b.branch_similarity(BranchSimilarity {
        states: &states,
        root: &root,
        layer_weights: &case.weights,
        num_branches: case.num_branches(),
        hidden: case.hidden,
        tau: case.tau,
        similarity: &mut similarity,
    })?;
    Ok((similarity, b.counters()))
}

#[test]
fn branch_similarity_is_the_same_on_both_backends() {
    for device in devices() {
        // One backend for all: its scratch serves any number of layers after any other.
        let (mut cpu, mut cuda) = (cpu(), cuda(device, 1, 1));
        for (num_layers, num_branches, hidden, tau) in [
            (1, 1, 1, 0.5),
            (40, 8, 64, 0.8),
            (2, 5, 257, 0.8),
            (28, 3, 97, 0.7),
            (12, 8, 192, 0.75),
            (3, 64, 200, 0.75),
            (60, 2, 33, 0.8),
            (1, 17, 896, 0.6),
            (29, 9, 128, 1.0),
            (12, 8, 192, 0.9),
        ] {
            let case = Case::random(num_layers, num_branches, hidden, tau);
            let what = format!("branch_similarity {num_layers}x{num_branches}x{hidden}");
            let ((want, on_cpu), (got, on_cuda)) =
                (compare(&mut cpu, &case).unwrap(), compare(&mut cuda, &case).unwrap());
            assert_eq!(on_cpu, Counters { launches: 1, read_backs: 1, ..Counters::default() }, "{what}");
            assert_eq!(on_cuda, on_cpu, "{what}");
            let pairs = got.to_root.iter().zip(&want.to_root).chain(got.pairwise.iter().zip(&want.pairwise));
            assert!(pairs.clone().all(|(g, w)| (g - w).abs() <= 4e-6), "{what}");
            assert_eq!((got.to_root.len(), got.pairwise.len()), (num_branches, num_branches * num_branches), "{what}");
            assert_eq!(got.labels, rksc::gate::cluster(&got.pairwise, num_branches, tau), "{what}");
            if want.pairwise.iter().all(|s| (s - tau).abs() > 1e-5) {
                assert_eq!(got.labels, want.labels, "{what}");
            }
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_by_both_backends() {
    let mut cuda = cuda(Device::emulated().unwrap(), 1, 1);
    let mut case = Case::random(2, 65, 8, 0.5);
    assert!(compare(&mut cpu(), &case).is_ok());
    let refused = compare(&mut cuda, &case).unwrap_err().to_string();
    assert!(refused.contains("65 branches") && refused.contains("64"), "{refused}");
    case.root.pop();
    assert!(matches!(compare(&mut cpu(), &case), Err(Error::Shape { op: "branch_similarity", .. })));
    let mut case = Case::random(2, 4, 8, 0.5);
    case.root.pop();
    for refused in [compare(&mut cpu(), &case), compare(&mut cuda, &case)] {
        assert!(matches!(refused, Err(Error::Shape { op: "branch_similarity", .. })), "{refused:?}");
    }
}

// ---- attention_mass ------------------------------------------------------------------------------------------------

fn weigh<B: Backend, T: Elem>(b: &mut B, world: &World<T>, lse: &[f32]) -> Result<(Vec<f32>, Counters)> {
    let buffer = |b: &mut B, values: &[T]| -> Result<B::Buf> {
        let mut buf = b.alloc(T::DTYPE, values.len())?;
        b.write_bytes(&mut buf, 0, values.len(), bytemuck::cast_slice(values))?;
        Ok(buf)
    };
    let (q, k_cache, lse) = (buffer(b, &world.q)?, buffer(b, &world.k)?, b.upload(lse)?);
    let (mut blocks, mut sequences, mut mass) = (Vec::new(), Vec::new(), vec![f32::NAN; 2]);
    for (i, seq) in world.seqs.iter().enumerate() {
        sequences.push(MassSequence { rows: world.rows(i), block_start: blocks.len(), kv_len: seq.kv_len });
        blocks.extend(&seq.blocks);
    }
    b.reset_counters();
    b.attention_mass(AttentionMass {
        q: &q,
        k_cache: &k_cache,
        lse: &lse,
        blocks: &blocks,
        sequences: &sequences,
        num_q_heads: world.num_q_heads,
        sm_scale: world.scale(),
        window: world.window,
        softcap: world.softcap,
        layout: &world.layout,
        mass: &mut mass,
    })?;
    Ok((mass, b.counters()))
}

fn mass_case<T: Elem>() {
    for device in devices() {
        let (mut cpu, mut cuda) = (cpu(), cuda(device, 4, 2));
        for (i, shape) in [
            shape((4, 2), 32, 16, &[], &[(1, 1)]),
            shape((4, 2), 64, 16, &[2], &[(40, 1), (64, 1), (65, 1)]),
            shape((4, 2), 64, 16, &[], &[(130, 70), (17, 1)]),
            shape((4, 2), 40, 16, &[], &[(66, 2)]),
            shape((4, 2), 32, 16, &[], &[(600, 1)]),
            shape((4, 2), 32, 16, &[], &[]),
        ]
        .iter()
        .enumerate()
        {
            let world = World::<T>::new(shape, i as u64);
            let (_, lse) = world.run(SimdLevel::detect(), 1);
            let what = format!("attention_mass {:?} {shape:?}", T::DTYPE);
            let ((want, on_cpu), (got, on_cuda)) =
                (weigh(&mut cpu, &world, &lse).unwrap(), weigh(&mut cuda, &world, &lse).unwrap());
            let slots: usize = world.seqs.iter().map(|s| s.kv_len).sum();
            let kv_read_bytes = (slots * 2 * world.layout.head_dim * T::DTYPE.size_bytes()) as u64;
            assert_eq!(on_cpu, Counters { launches: 1, read_backs: 1, kv_read_bytes, ..Counters::default() }, "{what}");
            assert_eq!(on_cuda, on_cpu, "{what}");
            assert_eq!((got.len(), want.len()), (2 * slots, 2 * slots), "{what}");
            for (slot, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() <= 2e-5 * (1.0 + w), "{what}: {slot}: {g} {w}");
            }
        }
    }
}

#[test]
fn attention_mass_is_the_same_on_both_backends() {
    mass_case::<f32>();
    mass_case::<bf16>();
    mass_case::<f16>();
}

// ---- passes --------------------------------------------------------------------------------------------------------

/// A probe between two passes may move the buffer that a recording writes to; one inside a recording is refused.
#[test]
fn probes_leave_recordings_whole() {
    let mut b = cuda(Device::emulated().unwrap(), 1, 1);
    let rows = Fill::new(1).normals(5 * 16, 2.0);
    let table = b.matrix(&[tensor("table", DType::F32, &[5, 16], &rows).into()], DType::F32).unwrap();
    let want = |id: u32| rksc::testing::oracle::row_stats(&rows[id as usize * 16..][..16]).argmax as u32;
    let mut x = b.alloc(DType::F32, 2 * 16).unwrap();
    for round in 0..3 {
        for ids in [[0, 1], [2, 3], [4, 0], [1, 1]] {
            let mut stats = [RowStats::default(); 2];
            let inputs = PassInputs { token_ids: ids.to_vec(), query_rows: vec![0, 1], ..PassInputs::default() };
            let inputs = b.stage(inputs).unwrap();
            b.begin_pass(&inputs, Some(0)).unwrap();
            b.embed(Embed { table: &table, inputs: &inputs, x: &mut x, scale: 1.0, hidden: 16 }).unwrap();
            b.row_stats(RowStatsOp { logits: &x, num_rows: 2, vocab: 16 }).unwrap();
            b.end_pass().unwrap();
            b.read_stats(&mut stats).unwrap();
            assert_eq!(stats.map(|s| s.argmax), ids.map(want), "round {round}");
        }
        assert!(b.counters().graph_replays > 0, "round {round}");
        // More rows each time: results and workspaces move.
        Probe::new(20 << round, 64, 300, DType::F32, 0).run(&mut b).unwrap();
        compare(&mut b, &Case::random(2 + round, 9, 64, 0.5)).unwrap();
    }

    let probe = |b: &mut Cuda, x: &<Cuda as Backend>::Buf| {
        let candidates = Some(&[1, 3][..]);
        b.entropy_probe(EntropyProbe { x, num_rows: 2, norm: None, eps: 0.0, w: &table, candidates, hidden: 16 })
    };
    let inputs = PassInputs { token_ids: vec![0, 1], query_rows: vec![0, 1], ..PassInputs::default() };
    let inputs = b.stage(inputs).unwrap();
    let mut refused = 0;
    for _ in 0..4 {
        b.begin_pass(&inputs, Some(0)).unwrap();
        b.embed(Embed { table: &table, inputs: &inputs, x: &mut x, scale: 1.0, hidden: 16 }).unwrap();
        if let Err(e) = probe(&mut b, &x) {
            assert!(e.to_string().contains("repeatable"), "{e}");
            refused += 1;
        }
        b.row_stats(RowStatsOp { logits: &x, num_rows: 2, vocab: 16 }).unwrap();
        b.end_pass().unwrap();
    }
    assert_eq!(refused, 2, "the first moves a buffer, the second is the first of its shape");
    b.begin_pass(&inputs, None).unwrap();
    b.embed(Embed { table: &table, inputs: &inputs, x: &mut x, scale: 1.0, hidden: 16 }).unwrap();
    probe(&mut b, &x).unwrap();
    b.end_pass().unwrap();
    let mut stats = [RowStats::default(); 2];
    b.read_stats(&mut stats).unwrap();
    assert!(stats.iter().all(|s| [1, 3].contains(&s.argmax) && s.finite == 1), "{stats:?}");
}

// ---- gather_rows ---------------------------------------------------------------------------------------------------

fn gather<B: Backend>(b: &mut B) {
    let src: Vec<f32> = (0..15).map(|i| i as f32).collect();
    let src = b.upload(&src).unwrap();
    let inputs = PassInputs { token_ids: vec![0; 5], query_rows: vec![4, 2, 0], ..PassInputs::default() };
    let inputs = b.stage(inputs).unwrap();
    let mut gathered = |rows: RowIds<'_, B>, dst_row: usize| -> Result<Vec<f32>> {
        let mut dst = b.upload(&[-1.0; 12])?;
        b.gather_rows(GatherRows { rows, src: &src, dst: &mut dst, dst_row, width: 3 })?;
        let mut out = vec![0.0; 12];
        b.read_f32(&dst, 0, &mut out)?;
        Ok(out)
    };
    let row = |r: usize| [3 * r, 3 * r + 1, 3 * r + 2].map(|x| x as f32);
    let none = [-1.0; 3];
    for (dst_row, want) in
        [(0, [row(4), row(1), none, none]), (1, [none, row(4), row(1), none]), (2, [none, none, row(4), row(1)])]
    {
        assert_eq!(gathered(RowIds::Given(&[4, 1]), dst_row).unwrap(), want.concat());
    }
    assert_eq!(gathered(RowIds::Queried(&inputs, 1..3), 2).unwrap(), [none, none, row(2), row(0)].concat());
    assert!(gathered(RowIds::Given(&[4, 1]), 3).is_err() && gathered(RowIds::Given(&[4]), 4).is_err());
    assert!(gathered(RowIds::Given(&[4]), 5).is_err());
    assert!(gathered(RowIds::Queried(&inputs, 2..4), 0).is_err());
}

#[test]
fn gather_rows_writes_from_its_first_row_on() {
    gather(&mut cpu());
    for device in devices() {
        gather(&mut cuda(device, 1, 1));
    }
}
