//! The query ring of `rope_append` through the trait, and its passes as recordings.

use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::{DType, Error, Result};

use crate::device::bits;
use crate::kv_transfer::{cache, contents};

const LAYOUT: KvLayout = KvLayout { num_blocks: 2, num_kv_heads: 1, block_size: 16, head_dim: 32, dtype: DType::Bf16 };
const Q_HEADS: usize = 2;
const WIDTH: usize = Q_HEADS * 32;
const ROWS: usize = 3;
const RING_ROWS: usize = 6;

/// What decode passes of three rows work on; a fourth row is there for shapes that are rounded up.
struct Pass<B: Backend> {
    qkv: B::Buf,
    q: B::Buf,
    k: B::Buf,
    v: B::Buf,
    inv_freq: B::Buf,
}

impl<B: Backend> Pass<B> {
    fn new(b: &mut B) -> Result<Self> {
        let len = LAYOUT.num_blocks * LAYOUT.block_elems();
        Ok(Self {
            qkv: b.upload(&Fill::new(4).normals((ROWS + 1) * (Q_HEADS + 2) * 32, 1.0))?,
            q: b.alloc(LAYOUT.dtype, (ROWS + 1) * WIDTH)?,
            k: b.alloc(LAYOUT.dtype, len)?,
            v: b.alloc(LAYOUT.dtype, len)?,
            inv_freq: b.upload(&[0.7; 16])?,
        })
    }

    /// The pass `step`; returns q.
    fn run(&mut self, b: &mut B, step: u32, ring_rows: &[u32], ring: Option<&mut B::Buf>) -> Result<Vec<f32>> {
        let inputs = b.stage(PassInputs {
            token_ids: vec![0; ROWS],
            positions: vec![step, 50 + step, 200 + step],
            slots: vec![step, 16 + step, 30],
            ring_rows: ring_rows.to_vec(),
            query_rows: vec![0, 1, 2],
            ..Default::default()
        })?;
        b.begin_pass(&inputs, Some(0))?;
        b.rope_append(RopeAppend {
            rows: 0..ROWS,
            inputs: &inputs,
            qkv: &self.qkv,
            q: &mut self.q,
            query_ring: ring,
            k_cache: &mut self.k,
            v_cache: &mut self.v,
            inv_freq: &self.inv_freq,
            rotary_dim: LAYOUT.head_dim,
            rope_scale: 1.0,
            qk_norm: None,
            num_q_heads: Q_HEADS,
            layout: &LAYOUT,
        })?;
        b.end_pass()?;
        contents(b, &self.q, LAYOUT.dtype, ROWS * WIDTH)
    }
}

const NONE: u32 = NO_RING_ROW;
/// Passes with and without ring rows come by in turn, each often enough to be replayed.
const PASSES: [&[u32]; 12] = [
    &[3, 1, NONE],
    &[0, NONE, 5],
    &[],
    &[NONE, NONE, 2],
    &[NONE, NONE, NONE],
    &[4, 5, 3],
    &[],
    &[NONE, 0, 1],
    &[NONE, NONE, NONE],
    &[],
    &[2, 3, 4],
    &[5, NONE, NONE],
];

fn keeps_queries<B: Backend>(b: &mut B) -> Result<u64> {
    let mut pass = Pass::new(b)?;
    let mut want = Fill::new(1)
        .normals(RING_ROWS * WIDTH, 1.0)
        .iter()
        .map(|&x| half::bf16::from_f32(x).to_f32())
        .collect::<Vec<_>>();
    let mut ring = cache(b, LAYOUT.dtype, &want)?;
    b.reset_counters();
    for (step, rows) in PASSES.into_iter().enumerate() {
        let q = pass.run(b, step as u32, rows, Some(&mut ring))?;
        for (&row, q) in rows.iter().zip(q.chunks_exact(WIDTH)).filter(|&(&row, _)| row != NONE) {
            want[row as usize * WIDTH..][..WIDTH].copy_from_slice(q);
        }
        let got = contents(b, &ring, LAYOUT.dtype, RING_ROWS * WIDTH)?;
        assert_eq!(bits(&got), bits(&want), "pass {step}");
    }
    let replays = b.counters().graph_replays;
    // Another ring in the place of the first: what was recorded for that one is not replayed.
    let mut other = b.alloc(LAYOUT.dtype, RING_ROWS * WIDTH)?;
    b.forget_recordings()?;
    let q = pass.run(b, 3, &[0, 1, 2], Some(&mut other))?;
    assert_eq!(bits(&contents(b, &other, LAYOUT.dtype, ROWS * WIDTH)?), bits(&q));
    assert_eq!(bits(&contents(b, &ring, LAYOUT.dtype, RING_ROWS * WIDTH)?), bits(&want));
    assert_eq!(b.counters().graph_replays, replays);
    Ok(replays)
}

fn refuses_lost_queries<B: Backend>(b: &mut B) -> Result<()> {
    let mut pass = Pass::new(b)?;
    let mut small = b.alloc(LAYOUT.dtype, 2 * WIDTH)?;
    let refused = |result: Result<Vec<f32>>| matches!(result, Err(Error::Shape { .. }));
    assert!(refused(pass.run(b, 0, &[0, NONE, NONE], None)), "no ring");
    assert!(refused(pass.run(b, 0, &[0, 2, NONE], Some(&mut small))), "past the ring");
    assert!(refused(pass.run(b, 0, &[0, 1], Some(&mut small))), "a row without an answer");
    pass.run(b, 0, &[NONE, NONE, NONE], None)?;
    pass.run(b, 0, &[0, 1, NONE], Some(&mut small))?;
    Ok(())
}

fn cuda() -> Cuda {
    let heads = Heads { num_q_heads: Q_HEADS, num_kv_heads: 1, block_size: 16 };
    Cuda::new(Device::emulated().unwrap(), heads)
}

#[test]
fn rope_append_keeps_queries_in_the_ring_of_this_pass() {
    for threads in [1, 2] {
        assert_eq!(keeps_queries(&mut Cpu::new(threads, SimdLevel::detect()).unwrap()).unwrap(), 0);
    }
    // 7 passes with ring rows and 5 without: of each the first is launched, the second recorded.
    assert_eq!(keeps_queries(&mut cuda()).unwrap(), 8);
}

#[test]
fn rope_append_refuses_queries_that_would_be_lost() {
    refuses_lost_queries(&mut Cpu::new(1, SimdLevel::detect()).unwrap()).unwrap();
    refuses_lost_queries(&mut cuda()).unwrap();
}

#[test]
fn recordings_are_not_forgotten_in_a_pass_that_needs_them() {
    let mut cuda = cuda();
    let mut pass = Pass::new(&mut cuda).unwrap();
    let inputs = || PassInputs { token_ids: vec![0; ROWS], query_rows: vec![0, 1, 2], ..Default::default() };
    pass.run(&mut cuda, 0, &[], None).unwrap();
    let staged = cuda.stage(inputs()).unwrap();
    cuda.begin_pass(&staged, Some(0)).unwrap();
    assert!(matches!(cuda.forget_recordings(), Err(Error::Internal(_))));
    // The pass that failed half-way is abandoned by the next.
    pass.run(&mut cuda, 1, &[], None).unwrap();
    pass.run(&mut cuda, 2, &[], None).unwrap();
    cuda.forget_recordings().unwrap();
}
