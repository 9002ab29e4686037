//! What a family chooses of an op (activation, norms, scales, partial rotation), through the trait: both backends give
//! their kernels the same, and refuse the same.

use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::cuda::device::Device;
use rksc::backend::cuda::{Cuda, Heads};
use rksc::backend::*;
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::{oracle, tensor};
use rksc::{DType, Error, Result};

use crate::device::wide;

const ROWS: usize = 5;
const WIDTH: usize = 24;
const Q_HEADS: usize = 4;
const LAYOUT: KvLayout = KvLayout { num_blocks: 1, num_kv_heads: 2, block_size: 16, head_dim: 12, dtype: DType::F32 };

fn cpu() -> Cpu {
    Cpu::new(1, SimdLevel::detect()).unwrap()
}

fn cuda() -> Cuda {
    let heads = Heads { num_q_heads: Q_HEADS, num_kv_heads: LAYOUT.num_kv_heads, block_size: LAYOUT.block_size };
    Cuda::new(Device::emulated().unwrap(), heads)
}

fn read<B: Backend>(b: &mut B, buf: &B::Buf, len: usize) -> Result<Vec<f32>> {
    let mut all = vec![0.0; len];
    b.read_f32(buf, 0, &mut all)?;
    Ok(all)
}

fn assert_same(what: &str, on_device: &[f32], on_cpu: &[f32]) {
    oracle::assert_close(&format!("{what} on both backends"), DType::F32, 4e-6, &wide(on_device), &wide(on_cpu));
}

/// Everything in x and y after the addition, of every combination.
fn norms<B: Backend>(b: &mut B) -> Result<Vec<f32>> {
    let (mut fill, len) = (Fill::new(1), ROWS * WIDTH);
    let before = fill.normals(len, 1.0);
    let delta = b.upload(&fill.normals(len, 1.0))?;
    let (weight, post_norm) = (b.upload(&fill.normals(WIDTH, 1.0))?, b.upload(&fill.normals(WIDTH, 1.0))?);
    let mut all = Vec::new();
    for post_norm in [None, Some(&post_norm)] {
        for output in [NormOutput::None, NormOutput::Rounded, NormOutput::Normed(&weight)] {
            let (untouched, rounded) = (matches!(output, NormOutput::None), matches!(output, NormOutput::Rounded));
            let (mut x, mut y) = (b.upload(&before)?, b.upload(&vec![7.0; len])?);
            b.add_rms_norm(AddRmsNorm {
                rows: 1..ROWS,
                x: &mut x,
                delta: Some(&delta),
                post_norm,
                output,
                y: &mut y,
                keep: None,
                step_similarity: None,
                hidden: WIDTH,
                eps: 1e-6,
            })?;
            let (x, y) = (read(b, &x, len)?, read(b, &y, len)?);
            assert_eq!(x[..WIDTH], before[..WIDTH]);
            assert_eq!(y.iter().all(|&y| y == 7.0), untouched);
            assert_eq!(y[WIDTH..] == x[WIDTH..], rounded);
            all.extend([x, y].concat());
        }
    }
    let (plain, normed) = all.split_at(all.len() / 2);
    assert!(plain[WIDTH..ROWS * WIDTH].iter().zip(&normed[WIDTH..]).all(|(a, b)| a != b));
    Ok(all)
}

#[test]
fn add_rms_norm_is_the_same_on_both_backends() {
    assert_same("add_rms_norm", &norms(&mut cuda()).unwrap(), &norms(&mut cpu()).unwrap());
}

/// q, K and V.
fn rope<B: Backend>(b: &mut B, rotary_dim: usize, span: Option<NormSpan>) -> Result<Vec<f32>> {
    let (dim, hkv) = (LAYOUT.head_dim, LAYOUT.num_kv_heads);
    let mut fill = Fill::new(2);
    let qkv = b.upload(&fill.normals(ROWS * (Q_HEADS + 2 * hkv) * dim, 1.0))?;
    let heads = if span == Some(NormSpan::Row) { [Q_HEADS, hkv] } else { [1, 1] };
    let [q_norm, k_norm] = heads.map(|heads| fill.normals(heads * dim, 1.0));
    let (q_norm, k_norm) = (b.upload(&q_norm)?, b.upload(&k_norm)?);
    let inv_freq: Vec<f32> = (0..rotary_dim / 2).map(|i| 1.0 / (i + 1) as f32).collect();
    let inv_freq = b.upload(&inv_freq)?;
    let slots: Vec<u32> = (0..ROWS as u32).collect();
    let positions = slots.iter().map(|slot| slot * 9).collect();
    let inputs = b.stage(PassInputs { token_ids: vec![0; ROWS], positions, slots, ..Default::default() })?;
    let (q_len, len) = (ROWS * Q_HEADS * dim, LAYOUT.block_elems());
    let mut q = b.alloc(DType::F32, q_len)?;
    let (mut k, mut v) = (b.alloc(DType::F32, len)?, b.alloc(DType::F32, len)?);
    b.rope_append(RopeAppend {
        rows: 0..ROWS,
        inputs: &inputs,
        qkv: &qkv,
        q: &mut q,
        query_ring: None,
        k_cache: &mut k,
        v_cache: &mut v,
        inv_freq: &inv_freq,
        rotary_dim,
        rope_scale: 1.5,
        qk_norm: span.map(|span| QkNorm { q: &q_norm, k: &k_norm, eps: 1e-5, span }),
        num_q_heads: Q_HEADS,
        layout: &LAYOUT,
    })?;
    Ok([read(b, &q, q_len)?, read(b, &k, len)?, read(b, &v, len)?].concat())
}

#[test]
fn rope_append_is_the_same_on_both_backends() {
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for span in [None, Some(NormSpan::Head), Some(NormSpan::Row)] {
        for rotary_dim in [12, 8, 2] {
            let on_cpu = rope(&mut cpu(), rotary_dim, span).unwrap();
            assert_same("rope_append", &rope(&mut cuda(), rotary_dim, span).unwrap(), &on_cpu);
            assert!(!seen.contains(&on_cpu), "{rotary_dim} {span:?} makes a difference");
            seen.push(on_cpu);
        }
        for rotary_dim in [0, 3, 14] {
            for refused in [rope(&mut cpu(), rotary_dim, span), rope(&mut cuda(), rotary_dim, span)] {
                assert!(matches!(refused, Err(Error::Shape { op: "rope_append", .. })), "{rotary_dim}");
            }
        }
    }
}

fn gated<B: Backend>(b: &mut B, activation: Activation) -> Result<Vec<f32>> {
    let gate_up = b.upload(&Fill::new(3).normals(ROWS * 2 * WIDTH, 3.0))?;
    let mut y = b.alloc(DType::F32, ROWS * WIDTH)?;
    b.glu(Glu { rows: 1..ROWS, gate_up: &gate_up, y: &mut y, intermediate: WIDTH, activation })?;
    read(b, &y, ROWS * WIDTH)
}

#[test]
fn glu_is_the_same_on_both_backends() {
    let [silu, gelu] = [Activation::Silu, Activation::GeluTanh].map(|activation| {
        let on_cpu = gated(&mut cpu(), activation).unwrap();
        assert_same("glu", &gated(&mut cuda(), activation).unwrap(), &on_cpu);
        assert!(on_cpu[..WIDTH].iter().all(|&y| y == 0.0), "row 0 is not asked for");
        on_cpu
    });
    assert!(silu[WIDTH..].iter().zip(&gelu[WIDTH..]).all(|(a, b)| a != b));
}

/// The first three rows of five.
fn capped<B: Backend>(b: &mut B, cap: f32) -> Result<Vec<f32>> {
    let before = Fill::new(4).normals(ROWS * WIDTH, 20.0);
    let mut logits = b.upload(&before)?;
    b.softcap(Softcap { logits: &mut logits, num_rows: 3, vocab: WIDTH, cap })?;
    let after = read(b, &logits, ROWS * WIDTH)?;
    assert_eq!(after[3 * WIDTH..], before[3 * WIDTH..]);
    assert!(after[..3 * WIDTH].iter().zip(&before).all(|(a, b)| a != b && a.abs() <= cap));
    Ok(after)
}

#[test]
fn softcap_is_the_same_on_both_backends() {
    for cap in [2.5, 30.0] {
        assert_same("softcap", &capped(&mut cuda(), cap).unwrap(), &capped(&mut cpu(), cap).unwrap());
    }
    for cap in [0.0, -30.0, f32::NAN, f32::INFINITY] {
        for refused in [capped(&mut cpu(), cap), capped(&mut cuda(), cap)] {
            assert!(matches!(refused, Err(Error::Shape { op: "softcap", .. })), "{cap}");
        }
    }
}

#[test]
fn embed_scales_on_both_backends() {
    fn run<B: Backend>(b: &mut B, scale: f32) -> Result<Vec<f32>> {
        let table = Fill::new(5).normals(7 * WIDTH, 1.0);
        let table = b.matrix(&[tensor("table", DType::F32, &[7, WIDTH], &table).into()], DType::F32)?;
        let inputs = b.stage(PassInputs { token_ids: vec![6, 0, 3], ..Default::default() })?;
        let mut x = b.alloc(DType::F32, 3 * WIDTH)?;
        b.embed(Embed { table: &table, inputs: &inputs, x: &mut x, scale, hidden: WIDTH })?;
        read(b, &x, 3 * WIDTH)
    }
    let plain = run(&mut cpu(), 1.0).unwrap();
    assert_eq!(run(&mut cuda(), 1.0).unwrap(), plain);
    let scaled: Vec<f32> = plain.iter().map(|x| x * 4.9).collect();
    assert_eq!(run(&mut cpu(), 4.9).unwrap(), scaled);
    assert_eq!(run(&mut cuda(), 4.9).unwrap(), scaled);
}
