//! `kv_transfer` against its float64 oracle: on the CPU at every level, through the trait on both backends, and the
//! kernel itself on every device.

use half::{bf16, f16};
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::bindings::{rksc_kv_transfer_params, rksc_slot_transfer};
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::kv::{BlockCopy, KvLayout, SlotTransfer};
use rksc::testing::fill::Fill;
use rksc::testing::oracle;
use rksc::{DType, Error, Result};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed, rounded, wide, widened};

/// (kv heads, head_dim, rotary_dim): every head_dim that attention takes, halves that are odd or no vector, and heads that
/// turn in part.
const HEADS: [(usize, usize, usize); 17] = [
    (1, 32, 32),
    (2, 64, 64),
    (3, 80, 80),
    (2, 96, 96),
    (2, 128, 128),
    (4, 256, 256),
    (8, 64, 64),
    (1, 2, 2),
    (2, 6, 6),
    (5, 10, 10),
    (3, 250, 250),
    (32, 8, 8),
    (2, 128, 96),
    (3, 64, 8),
    (2, 64, 62),
    (1, 10, 4),
    (2, 256, 2),
];

const SHIFTS: [i32; 8] = [0, 1, -1, 17, -260, 4096, -1_000_000, 2_000_000_000];

struct Case {
    layout: KvLayout,
    rotary_dim: usize,
    transfers: Vec<SlotTransfer>,
    inv_freq: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Case {
    /// `n` slots of the first half of a cache to as many of the second, in any order; a source may serve twice.
    fn new(
        dtype: DType,
        (num_kv_heads, head_dim, rotary_dim): (usize, usize, usize),
        block_size: usize,
        n: usize,
    ) -> Self {
        let layout = KvLayout { num_blocks: 8, num_kv_heads, block_size, head_dim, dtype };
        let mut fill = Fill::new((num_kv_heads * 1000 + head_dim * 10 + n) as u64);
        let half = 4 * block_size;
        let targets = fill.shuffled(half);
        let transfers = (0..n)
            .map(|i| SlotTransfer {
                src: fill.below(half) as u32,
                dst: half as u32 + targets[i],
                shift: SHIFTS[(i + n) % SHIFTS.len()],
            })
            .collect();
        let len = layout.num_blocks * layout.block_elems();
        let (k, v) = (fill.normals(len, 1.0), fill.normals(len, 1.0));
        Self { layout, rotary_dim, transfers, inv_freq: frequencies(rotary_dim), k, v }
    }

    fn all(dtype: DType) -> impl Iterator<Item = Self> {
        HEADS.into_iter().enumerate().flat_map(move |(i, heads)| {
            let sizes = [[1, 9], [2, 33], [0, 64]][i % 3];
            [16, 32].into_iter().zip(sizes).map(move |(block_size, n)| Self::new(dtype, heads, block_size, n))
        })
    }

    fn what(&self) -> String {
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = self.layout;
        format!(
            "kv_transfer {dtype} {num_kv_heads} heads of {}/{head_dim}, blocks of {block_size}, {}",
            self.rotary_dim,
            self.transfers.len()
        )
    }

    fn head(&self, slot: u32, head: usize) -> std::ops::Range<usize> {
        let (slot, size) = (slot as usize, self.layout.block_size);
        let at = self.layout.elem(slot / size, head, slot % size);
        at..at + self.layout.head_dim
    }

    /// K and V afterwards.
    fn want(&self) -> (Vec<f64>, Vec<f64>) {
        let dtype = self.layout.dtype;
        let (k_before, v_before) = (rounded(dtype, &self.k), rounded(dtype, &self.v));
        let (mut k, mut v) = (k_before.clone(), v_before.clone());
        for t in &self.transfers {
            for h in 0..self.layout.num_kv_heads {
                let (from, to) = (self.head(t.src, h), self.head(t.dst, h));
                let turned = oracle::turn(&k_before[from.clone()], t.shift, &self.inv_freq);
                let turned: Vec<f64> = turned.iter().map(|&x| oracle::round(dtype, x)).collect();
                k[to.clone()].copy_from_slice(&turned);
                v[to].copy_from_slice(&v_before[from]);
            }
        }
        (k, v)
    }

    /// V, and what K only copies, is exact; the rest of K is within one rounding.
    fn check(&self, what: &str, k: &[f32], v: &[f32]) {
        let (want_k, want_v) = self.want();
        oracle::assert_close(&format!("{what}: k"), self.layout.dtype, 2e-6, &wide(k), &want_k);
        assert_eq!(wide(v), want_v, "{what}: v");
        for t in &self.transfers {
            for h in 0..self.layout.num_kv_heads {
                let (from, to) = (self.head(t.src, h), self.head(t.dst, h));
                let passes = if t.shift == 0 { 0 } else { self.rotary_dim };
                let [from, to] = [&k[from][passes..], &k[to][passes..]];
                assert_eq!(bits(to), bits(from), "{what}: slot {} is copied from {passes} on", t.src);
            }
        }
    }

    /// Through the trait.
    fn run<B: Backend>(&self, b: &mut B) -> Result<(Vec<f32>, Vec<f32>, Counters)> {
        let (mut k, mut v) = (cache(b, self.layout.dtype, &self.k)?, cache(b, self.layout.dtype, &self.v)?);
        let inv_freq = b.upload(&self.inv_freq)?;
        let inputs = b.stage(PassInputs { transfers: self.transfers.clone(), ..Default::default() })?;
        b.reset_counters();
        b.kv_transfer(KvTransfer {
            inputs: &inputs,
            k_cache: &mut k,
            v_cache: &mut v,
            inv_freq: &inv_freq,
            rotary_dim: self.rotary_dim,
            layout: &self.layout,
        })?;
        let counters = b.counters();
        let len = self.k.len();
        Ok((contents(b, &k, self.layout.dtype, len)?, contents(b, &v, self.layout.dtype, len)?, counters))
    }
}

fn frequencies(rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / rotary_dim as f32)).collect()
}

pub(crate) fn cache<B: Backend>(b: &mut B, dtype: DType, x: &[f32]) -> Result<B::Buf> {
    let bytes: Vec<u8> = match dtype {
        DType::F32 => x.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::Bf16 => x.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect(),
        DType::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_ne_bytes()).collect(),
    };
    let mut buf = b.alloc(dtype, x.len())?;
    b.write_bytes(&mut buf, 0, x.len(), &bytes)?;
    Ok(buf)
}

pub(crate) fn contents<B: Backend>(b: &mut B, buf: &B::Buf, dtype: DType, len: usize) -> Result<Vec<f32>> {
    let mut bytes = Vec::new();
    b.read_bytes(buf, 0, len, &mut bytes)?;
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    Ok(match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect(),
        DType::Bf16 => halves().map(|b| bf16::from_ne_bytes(b).to_f32()).collect(),
        DType::F16 => halves().map(|b| f16::from_ne_bytes(b).to_f32()).collect(),
    })
}

fn cuda(layout: &KvLayout) -> Cuda {
    let KvLayout { num_kv_heads, block_size, .. } = *layout;
    Cuda::new(Device::emulated().unwrap(), Heads { num_q_heads: num_kv_heads, num_kv_heads, block_size })
}

#[test]
fn kv_transfer_matches_oracle_on_the_cpu_and_counts_its_bytes() {
    for level in SimdLevel::available() {
        let mut cpu = Cpu::new(1, level).unwrap();
        for case in DTYPES.into_iter().flat_map(Case::all) {
            let (k, v, counters) = case.run(&mut cpu).unwrap();
            case.check(&format!("{} {level}", case.what()), &k, &v);
            let KvLayout { num_kv_heads, head_dim, dtype, .. } = case.layout;
            let bytes = 2 * case.transfers.len() * num_kv_heads * head_dim * dtype.size_bytes();
            assert_eq!(counters, Counters { launches: 1, kv_write_bytes: bytes as u64, ..Counters::default() });
        }
    }
}

#[test]
fn kv_transfer_is_the_same_on_both_backends() {
    let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    for case in DTYPES.into_iter().flat_map(Case::all) {
        let what = format!("{} through the trait", case.what());
        let (_, _, on_cpu) = case.run(&mut cpu).unwrap();
        let (k, v, on_device) = case.run(&mut cuda(&case.layout)).unwrap();
        case.check(&what, &k, &v);
        assert_eq!(on_cpu, on_device, "{what}");
    }
}

#[test]
fn kv_transfer_matches_oracle_on_every_device() {
    for case in DTYPES.into_iter().flat_map(Case::all) {
        let what = case.what();
        let words = |t: &SlotTransfer| rksc_slot_transfer { src: t.src, dst: t.dst, shift: t.shift };
        let transfers: Vec<rksc_slot_transfer> = case.transfers.iter().map(words).collect();
        let KvLayout { num_kv_heads, head_dim, block_size, dtype, .. } = case.layout;
        for_each_device(&what, |dev| {
            let (list, inv_freq) = (dev.buffer(&transfers)?, dev.buffer(&case.inv_freq)?);
            let (mut k, mut v) = (narrowed(dev, dtype, &case.k)?, narrowed(dev, dtype, &case.v)?);
            let params = rksc_kv_transfer_params {
                transfers: list.ptr(),
                k_cache: k.ptr_mut().cast(),
                v_cache: v.ptr_mut().cast(),
                inv_freq: inv_freq.ptr(),
                num_transfers: transfers.len() as u32,
                num_kv_heads: num_kv_heads as u32,
                block_size: block_size as u32,
                head_dim: head_dim as u32,
                rotary_dim: case.rotary_dim as u32,
                dtype: dtype as u32,
            };
            dev.launch(dev.kernels().kv_transfer, &params)?;
            let (k, v) = (widened(dev, dtype, &k)?, widened(dev, dtype, &v)?);
            case.check(&what, &k, &v);
            Ok([bits(&k), bits(&v)].concat())
        });
    }
}

#[test]
fn kv_transfer_refuses_heads_it_cannot_split() {
    for_each_device("kv_transfer limits", |dev| {
        let heads = [(0, 0), (7, 6), (258, 64), (64, 0), (64, 7), (64, 66)].map(|(dim, rotary)| (dim, rotary, 16));
        for (head_dim, rotary_dim, block_size) in heads.into_iter().chain([(64, 64, 0)]) {
            let params = rksc_kv_transfer_params {
                num_transfers: 1,
                num_kv_heads: 1,
                head_dim,
                rotary_dim,
                block_size,
                ..Default::default()
            };
            assert_refused(dev.launch(dev.kernels().kv_transfer, &params));
        }
        Ok(Vec::new())
    });
    let mut cpu = Cpu::new(1, SimdLevel::detect()).unwrap();
    let mut case = Case::new(DType::F32, (1, 32, 32), 16, 1);
    for rotary_dim in [0, 7, 34] {
        case.rotary_dim = rotary_dim;
        for refused in [case.run(&mut cpu), case.run(&mut cuda(&case.layout))] {
            assert!(matches!(refused, Err(Error::Shape { op: "kv_transfer", .. })), "{rotary_dim}");
        }
    }
    case.rotary_dim = 32;
    case.transfers[0].dst = 8 * 16;
    assert!(matches!(case.run(&mut cpu), Err(Error::Shape { op: "kv_transfer", .. })));
}

/// What follows the transfers in a pass's inputs is where it was: a copy of a block that they wrote has what they wrote.
#[test]
fn kv_transfer_and_copies_share_a_passs_inputs() {
    fn run<B: Backend>(b: &mut B, case: &Case) -> Result<Vec<f32>> {
        let layout = &case.layout;
        let (mut k, mut v) = (cache(b, layout.dtype, &case.k)?, cache(b, layout.dtype, &case.v)?);
        let inv_freq = b.upload(&case.inv_freq)?;
        let copies = (4..6).map(|src| BlockCopy { src, dst: src - 4, num_slots: 11 }).collect();
        let inputs = b.stage(PassInputs { transfers: case.transfers.clone(), copies, ..Default::default() })?;
        let (inputs, k_cache, v_cache) = (&inputs, &mut k, &mut v);
        let rotary_dim = case.rotary_dim;
        b.kv_transfer(KvTransfer { inputs, k_cache, v_cache, inv_freq: &inv_freq, rotary_dim, layout })?;
        let (k_cache, v_cache) = (&mut k, &mut v);
        b.kv_copy_blocks(KvCopyBlocks { inputs, k_cache, v_cache, layout })?;
        contents(b, &k, layout.dtype, case.k.len())
    }
    let case = Case::new(DType::Bf16, (2, 64, 64), 16, 33);
    let got = run(&mut cuda(&case.layout), &case).unwrap();
    let (want, _) = case.want();
    for (block, head) in [(4, 0), (4, 1), (5, 0), (5, 1)] {
        let [from, to] = [block, block - 4].map(|b| case.layout.elem(b, head, 0));
        let len = 11 * case.layout.head_dim;
        assert_eq!(bits(&got[to..to + len]), bits(&got[from..from + len]));
        oracle::assert_close("copied", DType::Bf16, 2e-6, &wide(&got[to..to + len]), &want[from..from + len]);
    }
    oracle::assert_close(
        "as on the CPU",
        DType::Bf16,
        2e-6,
        &wide(&got),
        &wide(&run(&mut Cpu::new(1, SimdLevel::detect()).unwrap(), &case).unwrap()),
    );
}

/// K that RoPE turned to position p, transferred by s, is K at p + s, but for one rounding more and the rounding of the
/// angles' products.
fn moved_case<B: Backend>(b: &mut B, dtype: DType, (dim, rotary_dim): (usize, usize), what: &str) -> Result<()> {
    let layout = KvLayout { num_blocks: 2, num_kv_heads: 2, block_size: 16, head_dim: dim, dtype };
    // (position, shift)
    let moves = [(0, 5), (9, 0), (40, -40), (100, 3), (2000, -1700), (3, 3000)];
    let n = moves.len();
    let mut fill = Fill::new(dim as u64);
    let rows = fill.normals(n * 6 * dim, 1.0);
    let qkv = b.upload(&[&rows[..], &rows[..]].concat())?;
    let inv_freq = b.upload(&frequencies(rotary_dim))?;
    let len = 2 * layout.block_elems();
    let (mut k, mut v) = (b.alloc(dtype, len)?, b.alloc(dtype, len)?);
    let mut q = b.alloc(dtype, 2 * n * 2 * dim)?;
    // Each row at its position in block 0, and where it is moved to in the first half of block 1; transfers fill the second.
    let at = |from: u32| (0..n as u32).map(move |i| from + i);
    let transfers =
        moves.iter().zip(at(0)).map(|(&(_, shift), i)| SlotTransfer { src: i, dst: 24 + i, shift }).collect();
    let positions: Vec<u32> =
        moves.iter().map(|m| m.0 as u32).chain(moves.iter().map(|m| (m.0 + m.1) as u32)).collect();
    let inputs = b.stage(PassInputs {
        token_ids: vec![0; 2 * n],
        positions,
        slots: at(0).chain(at(16)).collect(),
        transfers,
        ..Default::default()
    })?;
    b.rope_append(RopeAppend {
        rows: 0..2 * n,
        inputs: &inputs,
        qkv: &qkv,
        q: &mut q,
        query_ring: None,
        k_cache: &mut k,
        v_cache: &mut v,
        inv_freq: &inv_freq,
        rotary_dim,
        rope_scale: 1.0,
        qk_norm: None,
        num_q_heads: 2,
        layout: &layout,
    })?;
    let (inputs, k_cache, v_cache, layout) = (&inputs, &mut k, &mut v, &layout);
    b.kv_transfer(KvTransfer { inputs, k_cache, v_cache, inv_freq: &inv_freq, rotary_dim, layout })?;
    let (k, v) = (contents(b, &k, dtype, len)?, contents(b, &v, dtype, len)?);
    for (i, &(position, shift)) in moves.iter().enumerate() {
        for head in 0..2 {
            let [there, moved] = [16 + i, 24 + i].map(|slot| layout.elem(slot / 16, head, slot % 16));
            assert_eq!(v[there..there + dim], v[moved..moved + dim], "{what}");
            assert_eq!(k[there + rotary_dim..there + dim], k[moved + rotary_dim..moved + dim], "{what}");
            let half = rotary_dim / 2;
            let furthest = f64::from(position.max(position + shift).max(shift.abs()));
            let angles = 2.0 * f64::from(f32::EPSILON) * furthest;
            for (i, (a, b)) in k[there..there + rotary_dim].iter().zip(&k[moved..]).enumerate() {
                // A pair keeps its length, which bounds both of its numbers.
                let length = f64::from(k[there + i % half]).hypot(f64::from(k[there + i % half + half]));
                let bound = length * (2.0 * oracle::eps(dtype) + angles) + 1e-6;
                let off = f64::from((a - b).abs());
                assert!(off <= bound, "{what}: {position} by {shift}, element {i}: {a} and {b}");
            }
        }
    }
    Ok(())
}

#[test]
fn keys_transferred_by_a_shift_are_the_keys_computed_there() {
    for dtype in DTYPES {
        for heads in [(32, 32), (64, 64), (128, 128), (6, 6), (128, 96), (10, 6)] {
            let (dim, rotary_dim) = heads;
            let layout = KvLayout { num_blocks: 2, num_kv_heads: 2, block_size: 16, head_dim: dim, dtype };
            let what = format!("{dtype} {rotary_dim}/{dim}");
            moved_case(&mut cuda(&layout), dtype, heads, &format!("{what} emulated")).unwrap();
            for level in SimdLevel::available() {
                let mut cpu = Cpu::new(1, level).unwrap();
                moved_case(&mut cpu, dtype, heads, &format!("{what} {level}")).unwrap();
            }
        }
    }
}
