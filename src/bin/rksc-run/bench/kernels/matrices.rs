//! Ops that stream weights: `linear`, `linear_w4`, `linear_w8`, cuBLASLt's product for many rows, `entropy_probe`.

use rksc::DType;
use rksc::backend::cuda::bindings::*;
use rksc::backend::cuda::cublas::{Cublas, Gemm};
use rksc::backend::cuda::device::Device;
use rksc::model::family::ModelConfig;
use rksc::quant::{CodeBits, ZeroKind};
use rksc::testing::linear_quantised::{CodeFormat, quantised_oracle, rows_with_codes};
use rksc::testing::oracle;

use super::harness::{Bench, COMPUTE};
use super::report::{Measured, error};

/// f32 sums of exact products.
const SUM_TOLERANCE: f64 = 1e-5;
/// Outputs of a row that are checked.
const CHECKED: usize = 61;

/// (name, in, out) of a layer's matrices, and the unembedding.
fn matrices(m: &ModelConfig) -> [(&'static str, usize, usize); 5] {
    let q = m.num_q_heads * m.head_dim;
    [
        ("qkv", m.hidden, q + 2 * m.num_kv_heads * m.head_dim),
        ("o", q, m.hidden),
        ("gate_up", m.hidden, 2 * m.intermediate),
        ("down", m.intermediate, m.hidden),
        ("lm_head", m.hidden, m.vocab_size),
    ]
}

/// Every (model, matrix, rows), one of them where nothing is timed.
fn cases(b: &Bench, rows: &[usize]) -> anyhow::Result<Vec<(String, usize, usize, usize)>> {
    let mut all = Vec::new();
    for (model, m) in b.models()? {
        for (name, k, n) in matrices(&m) {
            all.extend(rows.iter().map(|&t| (format!("{model} {name} {t} x {k} -> {n}"), t, k, n)));
        }
    }
    all.truncate(if b.timed { usize::MAX } else { 1 });
    Ok(all)
}

/// Outputs to check: evenly spread, the first and the last among them.
fn spread(n: usize) -> Vec<usize> {
    let count = CHECKED.min(n);
    (0..count).map(|i| i * (n - 1) / (count - 1).max(1)).collect()
}

/// bytes: weights 2 in out, x 2 t in, y 4 t out
pub(super) fn linear(b: &mut Bench) -> anyhow::Result<()> {
    for (shape, t, k, n) in cases(b, &[1, 8, 16])? {
        b.case("linear", shape, COMPUTE, |b| {
            let copies = b.copies(2 * k * n);
            let (x, w) = (b.noise(COMPUTE, t * k)?, b.noise(COMPUTE, copies * k * n)?);
            let mut y = b.results(4 * t * n)?;
            let mut workspace = b.dev.zeroed::<u8>(b.dev.kernels().linear_workspace_bytes(t, k, n))?;
            let params = rksc_linear_params {
                x: x.ptr(0),
                w: w.ptr(0),
                bias: std::ptr::null(),
                y: y.ptr_mut().cast(),
                workspace: workspace.ptr_mut().cast(),
                num_rows: t as u32,
                in_features: k as u32,
                out_features: n as u32,
                dtype: COMPUTE as u32,
                y_stride: n as u32,
                ..Default::default()
            };
            b.dev.launch(b.dev.kernels().linear, &params)?;
            let got = b.read(DType::F32, &y, (t - 1) * n, n)?;
            let row = x.wide((t - 1) * k, k);
            let (got, want): (Vec<f64>, Vec<f64>) = spread(n).iter().map(|&o| (got[o], w.dot(o * k, &row))).unzip();
            let times = b.time(copies, |dev, set| {
                dev.launch(dev.kernels().linear, &rksc_linear_params { w: w.ptr(set * k * n), ..params })
            })?;
            let bytes = 2 * k * n + 2 * t * k + 4 * t * n;
            Ok(Measured { bytes, flops: 2 * t * k * n, error: error(&got, &want), tolerance: SUM_TOLERANCE, times })
        })?;
    }
    Ok(())
}

/// bytes: codes in out / 2, scales and zeros 3 in out / group, x 2 t in, y 4 t out
pub(super) fn linear_w4(b: &mut Bench) -> anyhow::Result<()> {
    let format = CodeFormat { bits: CodeBits::W4, group: GROUP, zeros: ZeroKind::Integer };
    linear_of_codes(b, "linear_w4", format, |dev, params| dev.launch(dev.kernels().linear_w4, params))
}

/// bytes: codes in out, scales 2 in out / group (E4M3: 4), x 2 t in, y 4 t out
pub(super) fn linear_w8(b: &mut Bench) -> anyhow::Result<()> {
    linear_of_bytes(b, CodeBits::W8, RKSC_NUMBER_INTEGER)?;
    linear_of_bytes(b, CodeBits::F8, RKSC_NUMBER_E4M3)
}

fn linear_of_bytes(b: &mut Bench, bits: CodeBits, number: rksc_number) -> anyhow::Result<()> {
    let format = CodeFormat { bits, group: GROUP, zeros: ZeroKind::None };
    linear_of_codes(b, "linear_w8", format, |dev, p| {
        let params = rksc_linear_w8_params {
            x: p.x,
            codes: p.codes,
            scales: p.scales.cast(),
            bias: p.bias,
            y: p.y,
            workspace: p.workspace,
            route: p.route,
            num_rows: p.num_rows,
            in_features: p.in_features,
            out_features: p.out_features,
            group_size: p.group_size,
            number,
            dtype: p.dtype,
            y_stride: p.y_stride,
            layer: p.layer,
            side: p.side,
            reserved: 0,
        };
        dev.launch(dev.kernels().linear_w8, &params)
    })
}

/// Neighbours along k that share a scale and a zero.
const GROUP: usize = 128;

fn linear_of_codes(
    b: &mut Bench,
    op: &'static str,
    format: CodeFormat,
    launch: impl Fn(&mut Device, &rksc_linear_w4_params) -> rksc::Result<()>,
) -> anyhow::Result<()> {
    let per_word = format.bits.per_word();
    for (shape, t, k, n) in cases(b, &[1, 8, 16])? {
        if shape.contains("lm_head") {
            continue;
        }
        let number = if format.bits == CodeBits::F8 { ", E4M3" } else { "" };
        b.case(op, format!("{shape}, groups of {GROUP}{number}"), COMPUTE, |b| {
            let copies = b.copies(4 * k / per_word * n);
            let (x, codes) = (b.noise(COMPUTE, t * k)?, b.words(copies * k / per_word * n)?);
            // Scales and zeros of a matrix of this shape, with the codes of the bench.
            let w = format.random(n, k, 1);
            let (scale_buf, zero_buf) = (b.dev.buffer(w.scales().bytes())?, b.dev.buffer(w.zeros.bytes())?);
            let mut y = b.results(4 * t * n)?;
            let mut workspace = b.dev.zeroed::<u8>(b.dev.kernels().linear_workspace_bytes(t, k, n))?;
            let params = rksc_linear_w4_params {
                x: x.ptr(0),
                codes: codes.ptr(0),
                scales: scale_buf.ptr().cast(),
                zeros: zero_buf.ptr().cast(),
                y: y.ptr_mut().cast(),
                workspace: workspace.ptr_mut().cast(),
                num_rows: t as u32,
                in_features: k as u32,
                out_features: n as u32,
                group_size: GROUP as u32,
                zero_kind: w.zero_kind as u32,
                dtype: COMPUTE as u32,
                y_stride: n as u32,
                ..Default::default()
            };
            launch(&mut b.dev, &params)?;
            let got = b.read(DType::F32, &y, (t - 1) * n, n)?;
            let outputs = spread(n);
            let words = outputs.iter().flat_map(|&o| o * (k / per_word)..(o + 1) * (k / per_word));
            let checked = rows_with_codes(&w, &outputs, words.map(|i| codes.at(i)).collect());
            let (want, _) = quantised_oracle(&checked, &x.floats((t - 1) * k, k), None);
            let got: Vec<f64> = outputs.iter().map(|&o| got[o]).collect();
            let times = b.time(copies, |dev, set| {
                launch(dev, &rksc_linear_w4_params { codes: codes.ptr(set * k / per_word * n), ..params })
            })?;
            let bytes = w.num_bytes() as usize + 2 * t * k + 4 * t * n;
            Ok(Measured { bytes, flops: 2 * t * k * n, error: error(&got, &want), tolerance: SUM_TOLERANCE, times })
        })?;
    }
    Ok(())
}

/// Not an op of ours, but what runs instead of `linear` above 16 rows. Timed or not at all: the emulation has none, and a
/// sanitizer would look at somebody else's kernels.
/// bytes: as `linear`
pub(super) fn linear_cublas(b: &mut Bench) -> anyhow::Result<()> {
    if !b.timed {
        return Ok(());
    }
    for (shape, t, k, n) in cases(b, &[17, 64, 256, 1024])? {
        if !shape.contains("lm_head") {
            b.case("linear_cublas", shape, COMPUTE, |b| product(b, t, k, n))?;
        }
    }
    Ok(())
}

/// Operations a second at 1024 rows, as `linear_rate` has it for the CPU.
pub(super) fn product_rate(b: &mut Bench) -> anyhow::Result<f64> {
    let measured = product(b, 1024, 3584, 4608)?;
    let us = measured.times.map_or(f64::NAN, |times| times.us.p50);
    Ok(measured.flops as f64 / us * 1e6)
}

fn product(b: &mut Bench, t: usize, k: usize, n: usize) -> anyhow::Result<Measured> {
    let copies = b.copies(2 * k * n);
    let (x, w) = (b.noise(COMPUTE, t * k)?, b.noise(COMPUTE, copies * k * n)?);
    let mut y = b.results(4 * t * n)?;
    let mut cublas = Cublas::open(&b.dev)?;
    let product = Gemm {
        x: x.ptr(0),
        w: w.ptr(0),
        bias: std::ptr::null(),
        y: y.ptr_mut().cast(),
        num_rows: t,
        in_features: k,
        out_features: n,
        dtype: COMPUTE,
    };
    cublas.gemm(&mut b.dev, &product)?;
    let got = b.read(DType::F32, &y, (t - 1) * n, n)?;
    let row = x.wide((t - 1) * k, k);
    let (got, want): (Vec<f64>, Vec<f64>) = spread(n).iter().map(|&o| (got[o], w.dot(o * k, &row))).unzip();
    let times = b.time(copies, |dev, set| cublas.gemm(dev, &Gemm { w: w.ptr(set * k * n), ..product }))?;
    let bytes = 2 * k * n + 2 * t * k + 4 * t * n;
    Ok(Measured { bytes, flops: 2 * t * k * n, error: error(&got, &want), tolerance: SUM_TOLERANCE, times })
}

/// bytes: w 2 vocab hidden once per 64 rows, x 4 t hidden
pub(super) fn entropy_probe(b: &mut Bench) -> anyhow::Result<()> {
    const EPS: f32 = 1e-6;
    for (model, m) in b.models()? {
        let (k, n) = (m.hidden, m.vocab_size);
        for &t in b.sizes(&[8, 32, 104], &[3]) {
            b.case("entropy_probe", format!("{model} {t} rows over {n}"), COMPUTE, |b| {
                let (x, w) = (b.noise(DType::F32, t * k)?, b.noise(COMPUTE, k * n)?);
                // Logits of about N(0, 2).
                let norm = vec![2.0 / (k as f32).sqrt(); k];
                let norm_buf = b.dev.buffer(&norm)?;
                let chosen = b.dev.buffer(&vec![1u32; t])?;
                let mut stats = b.results(t * size_of::<rksc_statistics>())?;
                let mut logprob = b.results(4 * t)?;
                let mut workspace = b.dev.zeroed::<u8>(b.dev.kernels().entropy_probe_workspace_bytes(t, k, n))?;
                let params = rksc_entropy_probe_params {
                    x: x.ptr(0).cast(),
                    norm_weight: norm_buf.ptr(),
                    w: w.ptr(0),
                    candidates: std::ptr::null(),
                    chosen: chosen.ptr(),
                    stats: stats.ptr_mut().cast(),
                    chosen_logprob: logprob.ptr_mut().cast(),
                    workspace: workspace.ptr_mut().cast(),
                    num_rows: t as u32,
                    hidden: k as u32,
                    vocab: n as u32,
                    num_candidates: 0,
                    dtype: COMPUTE as u32,
                    eps: EPS,
                };
                b.dev.launch(b.dev.kernels().entropy_probe, &params)?;
                let words = b.read(DType::F32, &stats, (t - 1) * 7, 7)?;
                let logprob = b.read(DType::F32, &logprob, t - 1, 1)?[0];
                // The whole vocabulary in f64 would be gigabytes; logits rounded to f32 are near enough.
                let norm: Vec<f64> = norm.into_iter().map(f64::from).collect();
                let h = oracle::rms_norm(&x.wide((t - 1) * k, k), &norm, f64::from(EPS));
                let h: Vec<f64> = h.into_iter().map(|h| oracle::round(COMPUTE, h)).collect();
                let logits: Vec<f32> = (0..n).map(|o| w.dot(o * k, &h) as f32).collect();
                let s = oracle::row_stats(&logits);
                let got = [words[1], words[2], words[3], words[4], words[5], logprob];
                let max = f64::from(logits[s.argmax]);
                let want = [max, s.lse, s.entropy, s.top1, s.margin, f64::from(logits[1]) - s.lse];
                let times = b.time(1, |dev, _| dev.launch(dev.kernels().entropy_probe, &params))?;
                // h is rounded to the compute type, and now and then to the other side than the oracle's.
                let (bytes, tolerance) = (2 * k * n * t.div_ceil(64) + 4 * t * k, 4e-3);
                Ok(Measured { bytes, flops: 2 * t * k * n, error: error(&got, &want), tolerance, times })
            })?;
        }
    }
    Ok(())
}
