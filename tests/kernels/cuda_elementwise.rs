//! `embed`, `glu`, `gather_rows`, `gather_columns`, `softcap`, `add_rms_norm`, `rope_append` and `kv_copy_blocks` against
//! float64 oracles.

use std::ptr::{null, null_mut};

use rksc::DType;
use rksc::backend::cuda::bindings::*;
use rksc::backend::{Activation, NormSpan};
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::{oracle, round_to};

use crate::device::{DTYPES, assert_refused, bits, for_each_device, narrowed, rounded, wide, widened};

fn round_all(dtype: DType, x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| oracle::round(dtype, x)).collect()
}

/// (rows, width)
const ROWS: [(usize, usize); 24] = [
    (0, 64),
    (1, 1),
    (1, 2),
    (1, 3),
    (1, 4),
    (2, 7),
    (3, 8),
    (1, 31),
    (2, 33),
    (5, 97),
    (2, 127),
    (2, 128),
    (3, 130),
    (2, 255),
    (2, 256),
    (2, 257),
    (70, 256),
    (3, 1023),
    (3, 1024),
    (3, 1028),
    (8, 896),
    (4, 2048),
    (2, 2050),
    (2, 4864),
];

#[test]
fn embed_copies_rows_and_marks_ids_past_the_table() {
    for dtype in DTYPES {
        for (rows, hidden) in ROWS {
            let (what, vocab) = (format!("embed {dtype} {rows}x{hidden}"), 37);
            let table = Fill::new(hidden as u64).normals(vocab * hidden, 1.0);
            let mut ids: Vec<u32> = (0..rows as u32).map(|i| i * 7 % vocab as u32).collect();
            let scale = if hidden % 3 == 0 { 29.933_259 } else { 1.0 };
            let mut want: Vec<f64> = ids
                .iter()
                .flat_map(|&i| rounded(dtype, &table[i as usize * hidden..][..hidden]))
                .map(|x| f64::from(x as f32 * scale))
                .collect();
            let past = if rows > 4 { 1 } else { 0 };
            if past == 1 {
                ids[rows - 1] = vocab as u32;
                want.truncate((rows - 1) * hidden);
            }
            for_each_device(&what, |dev| {
                let (table, ids) = (narrowed(dev, dtype, &table)?, dev.buffer(&ids)?);
                let mut x = dev.alloc::<f32>(rows * hidden)?;
                let params = rksc_embed_params {
                    table: table.ptr().cast(),
                    ids: ids.ptr(),
                    x: x.ptr_mut(),
                    num_rows: rows as u32,
                    hidden: hidden as u32,
                    vocab: vocab as u32,
                    dtype: dtype as u32,
                    scale,
                    reserved: 0,
                };
                dev.launch(dev.kernels().embed, &params)?;
                let x = dev.to_vec(&x)?;
                assert_eq!(wide(&x[..want.len()]), want, "{what}");
                assert!(x[want.len()..].iter().all(|x| x.is_nan()) && x.len() == want.len() + past * hidden, "{what}");
                Ok(bits(&x))
            });
        }
    }
}

#[test]
fn gather_rows_copies_rows() {
    for (rows, width) in ROWS {
        let (what, held) = (format!("gather_rows {rows}x{width}"), 11);
        let src = Fill::new(width as u64).normals(held * width, 1.0);
        let ids: Vec<u32> = (0..rows as u32).map(|i| i * 5 % held as u32).collect();
        let want: Vec<f32> = ids.iter().flat_map(|&i| &src[i as usize * width..][..width]).copied().collect();
        for_each_device(&what, |dev| {
            let (src, ids) = (dev.buffer(&src)?, dev.buffer(&ids)?);
            let mut dst = dev.alloc::<f32>(rows * width)?;
            let params = rksc_gather_rows_params {
                rows: ids.ptr(),
                src: src.ptr(),
                dst: dst.ptr_mut(),
                num_rows: rows as u32,
                width: width as u32,
            };
            dev.launch(dev.kernels().gather_rows, &params)?;
            let dst = dev.to_vec(&dst)?;
            assert_eq!(dst, want, "{what}");
            Ok(bits(&dst))
        });
    }
}

#[test]
fn gather_columns_moves_elements_of_a_row() {
    for dtype in [DType::Bf16, DType::F16] {
        for (rows, width) in ROWS {
            let what = format!("gather_columns {dtype} {rows}x{width}");
            let src = round_to(&Fill::new(width as u64).normals(rows * width, 1.0), dtype);
            let mut columns: Vec<u32> = (0..width as u32).collect();
            columns.sort_by_key(|k| k.wrapping_mul(0x9e37_79b9));
            let row = |t: usize| columns.iter().map(move |&k| (t, k as usize));
            let want: Vec<f32> = (0..rows).flat_map(row).map(|(t, k)| src[t * width + k]).collect();
            for_each_device(&what, |dev| {
                let (src, columns) = (narrowed(dev, dtype, &src)?, dev.buffer(&columns)?);
                let mut dst = dev.alloc::<u8>(rows * width * dtype.size_bytes())?;
                let params = rksc_gather_columns_params {
                    src: src.ptr().cast(),
                    columns: columns.ptr(),
                    dst: dst.ptr_mut().cast(),
                    num_rows: rows as u32,
                    width: width as u32,
                    dtype: dtype as u32,
                    reserved: 0,
                };
                dev.launch(dev.kernels().gather_columns, &params)?;
                let dst = widened(dev, dtype, &dst)?;
                assert_eq!(dst, want, "{what}");
                assert_refused(
                    dev.launch(dev.kernels().gather_columns, &rksc_gather_columns_params { dtype: 0, ..params }),
                );
                Ok(bits(&dst))
            });
        }
    }
}

#[test]
fn glu_matches_oracle() {
    for (activation, code) in [(Activation::Silu, RKSC_SILU), (Activation::GeluTanh, RKSC_GELU_TANH)] {
        for (dtype, (rows, n)) in DTYPES.into_iter().flat_map(|dtype| ROWS.map(|shape| (dtype, shape))) {
            let what = format!("glu {activation:?} {dtype} {rows}x{n}");
            let mut gate_up = Fill::new(n as u64).normals(rows * 2 * n, 4.0);
            if n > 5 && rows > 0 {
                gate_up[..5].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, -20.0]);
            }
            let want: Vec<f64> = gate_up
                .chunks(2 * n)
                .flat_map(|row| (0..n).map(|i| oracle::glu(activation, f64::from(row[i]), f64::from(row[n + i]))))
                .map(|y| oracle::round(dtype, y))
                .collect();
            for_each_device(&what, |dev| {
                let x = dev.buffer(&gate_up)?;
                let mut y = dev.alloc::<u8>(rows * n * dtype.size_bytes())?;
                let params = rksc_glu_params {
                    gate_up: x.ptr(),
                    y: y.ptr_mut().cast(),
                    num_rows: rows as u32,
                    intermediate: n as u32,
                    activation: code,
                    dtype: dtype as u32,
                };
                dev.launch(dev.kernels().glu, &params)?;
                let y = widened(dev, dtype, &y)?;
                oracle::assert_close(&what, dtype, 1e-5, &wide(&y), &want);
                Ok(bits(&y))
            });
        }
    }
}

#[test]
fn softcap_matches_oracle() {
    for (rows, vocab) in ROWS {
        let (what, cap) = (format!("softcap {rows}x{vocab}"), [0.5, 30.0, 50.0][vocab % 3]);
        let mut before = Fill::new(vocab as u64).normals((rows + 1) * vocab, 40.0);
        before[0] = 1e-3;
        for_each_device(&what, |dev| {
            let mut logits = dev.buffer(&before)?;
            let params = rksc_softcap_params {
                logits: logits.ptr_mut(),
                num_rows: rows as u32,
                vocab: vocab as u32,
                cap,
                reserved: 0,
            };
            dev.launch(dev.kernels().softcap, &params)?;
            let after = dev.to_vec(&logits)?;
            for (i, (&x, &got)) in before.iter().zip(&after).enumerate() {
                let x = f64::from(x);
                let want = if i < rows * vocab { oracle::softcap(f64::from(cap), x) } else { x };
                let off = (f64::from(got) - want).abs();
                assert!(off <= 6e-7 * want.abs(), "{what}: index {i}: {got}, {want}");
            }
            Ok(bits(&after))
        });
    }
}

#[test]
fn params_without_a_meaning_are_refused() {
    for_each_device("refused", |dev| {
        for cap in [0.0, -1.0, f32::NAN] {
            let params = rksc_softcap_params { num_rows: 1, vocab: 1, cap, ..Default::default() };
            assert_refused(dev.launch(dev.kernels().softcap, &params));
        }
        let params = rksc_glu_params { num_rows: 1, intermediate: 1, activation: 2, ..Default::default() };
        assert_refused(dev.launch(dev.kernels().glu, &params));
        // A weight, and nowhere for what it makes.
        let weight = dev.buffer(&[1.0f32])?;
        let params = rksc_add_rms_norm_params { num_rows: 1, hidden: 1, weight: weight.ptr(), ..Default::default() };
        assert_refused(dev.launch(dev.kernels().add_rms_norm, &params));
        Ok(Vec::new())
    });
}

/// What `y` is to be.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Y {
    Nothing,
    Rounded,
    Normed,
}

/// What of `add_rms_norm` a case asks for.
#[derive(Clone, Copy, Debug)]
struct Asked {
    delta: bool,
    post_norm: bool,
    y: Y,
    reference: bool,
    similarity: bool,
    keep: bool,
}

fn norm_case(dtype: DType, rows: usize, hidden: usize, asked: Asked, scale: f32) {
    let what = format!("add_rms_norm {dtype} {rows}x{hidden} {asked:?} scale {scale}");
    let mut fill = Fill::new(hidden as u64);
    let mut before = fill.normals(rows * hidden, scale);
    if rows > 2 {
        before[hidden..2 * hidden].fill(0.0);
    }
    let (delta, reference) = (fill.normals(rows * hidden, 0.3 * scale), fill.normals(rows * hidden, scale));
    let (weight, post_norm) = (fill.normals(hidden, 1.0), fill.normals(hidden, 1.0));
    let added = |row: usize| match (asked.delta, asked.post_norm) {
        (true, false) => wide(&delta[row * hidden..][..hidden]),
        (true, true) => oracle::rms_norm(&wide(&delta[row * hidden..][..hidden]), &wide(&post_norm), 1e-6),
        (false, _) => vec![0.0; hidden],
    };
    let sums: Vec<f64> = (0..rows).flat_map(added).zip(&before).map(|(d, &x)| f64::from(x) + d).collect();
    for_each_device(&what, |dev| {
        let (mut x, delta_buf, weight_buf) = (dev.buffer(&before)?, dev.buffer(&delta)?, dev.buffer(&weight)?);
        let (reference_buf, post_norm_buf) = (dev.buffer(&reference)?, dev.buffer(&post_norm)?);
        let mut y = dev.zeroed::<u8>(rows * hidden * dtype.size_bytes())?;
        let (mut similarity, mut keep) = (dev.zeroed::<f32>(rows)?, dev.zeroed::<f32>(rows * hidden)?);
        let params = rksc_add_rms_norm_params {
            x: x.ptr_mut(),
            delta: if asked.delta { delta_buf.ptr() } else { null() },
            post_norm: if asked.post_norm { post_norm_buf.ptr() } else { null() },
            weight: if asked.y == Y::Normed { weight_buf.ptr() } else { null() },
            y: if asked.y == Y::Nothing { null_mut() } else { y.ptr_mut().cast() },
            keep: if asked.keep { keep.ptr_mut() } else { null_mut() },
            reference: if asked.reference { reference_buf.ptr() } else { null() },
            similarity: if asked.similarity { similarity.ptr_mut() } else { null_mut() },
            num_rows: rows as u32,
            hidden: hidden as u32,
            dtype: dtype as u32,
            eps: 1e-6,
        };
        dev.launch(dev.kernels().add_rms_norm, &params)?;
        let (x, y, similarity) = (dev.to_vec(&x)?, widened(dev, dtype, &y)?, dev.to_vec(&similarity)?);
        if asked.post_norm && asked.delta {
            oracle::assert_close(&format!("{what}: x"), DType::F32, 2e-6 * f64::from(scale), &wide(&x), &sums);
        } else {
            let want: Vec<f32> = sums.iter().map(|&x| x as f32).collect();
            assert_eq!(x, want, "{what}: x");
        }
        assert_eq!(dev.to_vec(&keep)?, if asked.keep { x.clone() } else { vec![0.0; rows * hidden] }, "{what}");
        for (r, &got) in similarity.iter().enumerate() {
            let part = r * hidden..(r + 1) * hidden;
            let (row, y) = (wide(&x[part.clone()]), wide(&y[part.clone()]));
            match asked.y {
                Y::Nothing => assert!(y.iter().all(|&y| y == 0.0), "{what} row {r}"),
                Y::Rounded => assert_eq!(y, round_all(dtype, &row), "{what} row {r}"),
                Y::Normed => {
                    let want = round_all(dtype, &oracle::rms_norm(&row, &wide(&weight), 1e-6));
                    oracle::assert_close(&format!("{what} row {r}"), dtype, 2e-6, &y, &want);
                }
            }
            let against = if asked.reference { &reference } else { &before };
            let want = if asked.similarity { oracle::cosine(&wide(&against[part]), &row) } else { 0.0 };
            assert!((f64::from(got) - want).abs() < 2e-6, "{what} row {r}: {got} {want}");
        }
        Ok([bits(&x), bits(&y), bits(&similarity)].concat())
    });
}

#[test]
fn add_rms_norm_matches_oracle() {
    let all = Asked { delta: true, post_norm: false, y: Y::Normed, reference: false, similarity: true, keep: true };
    for dtype in DTYPES {
        for (i, (rows, hidden)) in ROWS.into_iter().enumerate() {
            norm_case(dtype, rows, hidden, all, 2.0);
            let y = if i % 2 == 0 { Y::Normed } else { Y::Rounded };
            norm_case(dtype, rows, hidden, Asked { post_norm: true, y, ..all }, 2.0);
        }
        for hidden in [3584, 4092, 4096, 4097, 5120, 8188, 8192, 8194, 8196, 16_384] {
            norm_case(dtype, 2, hidden, Asked { similarity: hidden % 8 == 0, post_norm: hidden % 3 == 0, ..all }, 2.0);
        }
    }
}

#[test]
fn add_rms_norm_without_its_options() {
    for hidden in [6, 8, 1000, 8196] {
        for mask in 0..32 {
            let is = |bit: usize| mask >> bit & 1 == 1;
            let (delta, post_norm) = (is(0), is(1));
            for y in [Y::Nothing, Y::Rounded, Y::Normed] {
                let asked = Asked { delta, post_norm, y, reference: is(2), similarity: is(3), keep: is(4) };
                norm_case(DType::Bf16, 3, hidden, asked, 1.0);
            }
        }
        // Squares beyond f32 in the product of two sums.
        let y = Y::Nothing;
        let compared = Asked { delta: true, post_norm: false, y, reference: true, similarity: true, keep: false };
        norm_case(DType::F32, 3, hidden, compared, 1e16);
    }
}

struct Rope {
    hq: usize,
    hkv: usize,
    dim: usize,
    rotary_dim: usize,
    block_size: usize,
    rows: usize,
    norm: Option<NormSpan>,
    furthest: u32,
}

fn rope_case(dtype: DType, case: &Rope) {
    let &Rope { hq, hkv, dim, rotary_dim, block_size, rows, norm, furthest } = case;
    let what = format!(
        "rope_append {dtype} {hq}/{hkv} heads of {rotary_dim}/{dim}, {norm:?}, blocks of {block_size}, {rows} rows to {furthest}"
    );
    let num_blocks = rows.div_ceil(block_size) + 1;
    let layout = KvLayout { num_blocks, num_kv_heads: hkv, block_size, head_dim: dim, dtype };
    let mut fill = Fill::new((dim * 31 + hq) as u64);
    let width = (hq + 2 * hkv) * dim;
    let qkv = fill.normals(rows * width, 1.5);
    let (q_span, k_span) = if norm == Some(NormSpan::Row) { (hq, hkv) } else { (1, 1) };
    let (qw, kw) = (fill.normals(q_span * dim, 1.0), fill.normals(k_span * dim, 1.0));
    let inv_freq: Vec<f32> = (0..rotary_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary_dim as f32)).collect();
    let positions: Vec<u32> =
        (0..rows).map(|r| if r == 0 { furthest } else { fill.below(furthest as usize + 1) as u32 }).collect();
    let mut slots = fill.shuffled(num_blocks * block_size)[..rows].to_vec();
    for slot in slots.iter_mut().skip(2).step_by(5) {
        *slot = RKSC_NO_SLOT;
    }
    // Every third row's q is not kept; the ring has rows that nobody writes.
    let ring = hq % 3 != 0;
    let mut kept_at = fill.shuffled(rows + 4)[..rows].to_vec();
    for row in kept_at.iter_mut().step_by(3) {
        *row = RKSC_NO_SLOT;
    }
    let ring_before = fill.normals((rows + 4) * hq * dim, 1.0);
    let cache = fill.normals(2 * num_blocks * layout.block_elems(), 1.0);
    let (k_before, v_before) = cache.split_at(cache.len() / 2);

    let heads = |row: usize, first: usize, count: usize| wide(&qkv[row * width + first * dim..][..count * dim]);
    // Head h of the row's heads [first, first + count).
    let rotated = |row: usize, (first, count): (usize, usize), h: usize, w: &[f32]| {
        let x = match norm {
            None => heads(row, first + h, 1),
            Some(NormSpan::Head) => oracle::rms_norm(&heads(row, first + h, 1), &wide(w), 1e-5),
            Some(NormSpan::Row) => {
                oracle::rms_norm(&heads(row, first, count), &wide(w), 1e-5)[h * dim..][..dim].to_vec()
            }
        };
        round_all(dtype, &oracle::rope(&x, positions[row], &inv_freq, 1.25))
    };
    let (mut want_q, mut want_k, mut want_v) = (Vec::new(), rounded(dtype, k_before), rounded(dtype, v_before));
    for (r, &slot) in slots.iter().enumerate() {
        for h in 0..hq {
            want_q.extend(rotated(r, (0, hq), h, &qw));
        }
        if slot == RKSC_NO_SLOT {
            continue;
        }
        for h in 0..hkv {
            let slot = slot as usize;
            let at = layout.elem(slot / block_size, h, slot % block_size);
            want_k[at..at + dim].copy_from_slice(&rotated(r, (hq, hkv), h, &kw));
            want_v[at..at + dim].copy_from_slice(&round_all(dtype, &heads(r, hq + hkv + h, 1)));
        }
    }
    for_each_device(&what, |dev| {
        let (x, freqs) = (dev.buffer(&qkv)?, dev.buffer(&inv_freq)?);
        let (positions, slots, ring_rows) = (dev.buffer(&positions)?, dev.buffer(&slots)?, dev.buffer(&kept_at)?);
        let mut query_ring = narrowed(dev, dtype, &ring_before)?;
        let (qw, kw) = (dev.buffer(&qw)?, dev.buffer(&kw)?);
        let mut q = dev.alloc::<u8>(rows * hq * dim * dtype.size_bytes())?;
        let (mut k, mut v) = (narrowed(dev, dtype, k_before)?, narrowed(dev, dtype, v_before)?);
        let params = rksc_rope_append_params {
            qkv: x.ptr(),
            q: q.ptr_mut().cast(),
            query_ring: if ring { query_ring.ptr_mut().cast() } else { null_mut() },
            k_cache: k.ptr_mut().cast(),
            v_cache: v.ptr_mut().cast(),
            positions: positions.ptr(),
            slots: slots.ptr(),
            ring_rows: ring_rows.ptr(),
            inv_freq: freqs.ptr(),
            q_norm: if norm.is_some() { qw.ptr() } else { null() },
            k_norm: if norm.is_some() { kw.ptr() } else { null() },
            num_rows: rows as u32,
            num_q_heads: hq as u32,
            num_kv_heads: hkv as u32,
            head_dim: dim as u32,
            rotary_dim: rotary_dim as u32,
            block_size: block_size as u32,
            dtype: dtype as u32,
            norm_span: if norm == Some(NormSpan::Row) { RKSC_NORM_ROW } else { RKSC_NORM_HEAD },
            rope_scale: 1.25,
            norm_eps: 1e-5,
        };
        dev.launch(dev.kernels().rope_append, &params)?;
        let (q, k, v) = (widened(dev, dtype, &q)?, widened(dev, dtype, &k)?, widened(dev, dtype, &v)?);
        oracle::assert_close(&format!("{what} q"), dtype, 4e-6, &wide(&q), &want_q);
        oracle::assert_close(&format!("{what} k"), dtype, 4e-6, &wide(&k), &want_k);
        assert_eq!(wide(&v), want_v, "{what} v");
        let mut want_ring = rounded(dtype, &ring_before);
        for (row, &kept) in q.chunks_exact(hq * dim).zip(&kept_at).filter(|&(_, &kept)| ring && kept != RKSC_NO_SLOT) {
            want_ring[kept as usize * hq * dim..][..hq * dim].copy_from_slice(&wide(row));
        }
        assert_eq!(wide(&widened(dev, dtype, &query_ring)?), want_ring, "{what} query ring");
        Ok([bits(&q), bits(&k), bits(&v)].concat())
    });
}

#[test]
fn rope_append_matches_oracle() {
    // (hq, hkv): groups 1 to 8 and 16.
    let heads = [(4, 4), (4, 2), (6, 2), (4, 1), (5, 1), (12, 2), (14, 2), (8, 1), (16, 1), (1, 1)];
    // (head_dim, rotary_dim)
    let dims = [
        (32, 32),
        (64, 64),
        (80, 80),
        (96, 96),
        (128, 128),
        (256, 256),
        (2, 2),
        (6, 6),
        (10, 10),
        (250, 250),
        (128, 96),
        (64, 16),
        (80, 78),
        (256, 2),
        (10, 4),
    ];
    for dtype in DTYPES {
        for (i, &(dim, rotary_dim)) in dims.iter().enumerate() {
            for j in 0..3 {
                let (hq, hkv) = heads[(i * 3 + j) % heads.len()];
                let rows = [1, 15, 33][j] + i % 3;
                let block_size = [16, 32][(i + j) % 2];
                let norm = [None, Some(NormSpan::Head), Some(NormSpan::Row)][(i + j) % 3];
                let furthest = [100, 32_768, 1_000_000][(i / 3 + j) % 3];
                rope_case(dtype, &Rope { hq, hkv, dim, rotary_dim, block_size, rows, norm, furthest });
            }
        }
        let norm = Some(NormSpan::Head);
        let none = Rope { hq: 2, hkv: 1, dim: 64, rotary_dim: 64, block_size: 16, rows: 0, norm, furthest: 5 };
        rope_case(dtype, &none);
        rope_case(dtype, &Rope { hq: 28, hkv: 4, dim: 128, rotary_dim: 128, rows: 8, ..none });
        rope_case(dtype, &Rope { hq: 1, hkv: 1, dim: 8, rotary_dim: 8, rows: 4096, furthest: 4096, ..none });
        // CTAs with q heads, with q and k, with k, with k and v, and with v alone.
        let norm = Some(NormSpan::Row);
        rope_case(dtype, &Rope { hq: 19, hkv: 19, dim: 128, rotary_dim: 128, rows: 3, norm, ..none });
        rope_case(dtype, &Rope { hq: 16, hkv: 8, dim: 128, rotary_dim: 96, rows: 3, norm, ..none });
    }
}

#[test]
fn rope_append_refuses_heads_it_cannot_split() {
    for_each_device("rope_append limits", |dev| {
        let weight = dev.buffer(&[1.0f32; 64])?;
        let rope = rksc_rope_append_params {
            num_rows: 1,
            num_q_heads: 1,
            num_kv_heads: 1,
            block_size: 16,
            head_dim: 64,
            rotary_dim: 64,
            ..Default::default()
        };
        for (head_dim, rotary_dim) in [(0, 0), (7, 6), (258, 64), (64, 0), (64, 31), (64, 66)] {
            let params = rksc_rope_append_params { head_dim, rotary_dim, ..rope };
            assert_refused(dev.launch(dev.kernels().rope_append, &params));
        }
        for params in [
            rksc_rope_append_params { norm_span: 2, ..rope },
            rksc_rope_append_params { q_norm: weight.ptr(), ..rope },
            rksc_rope_append_params { k_norm: weight.ptr(), ..rope },
        ] {
            assert_refused(dev.launch(dev.kernels().rope_append, &params));
        }
        Ok(Vec::new())
    });
}

#[test]
fn kv_copy_blocks_copies_the_heads_of_blocks() {
    let shapes = [(1, 32), (2, 64), (2, 80), (3, 96), (2, 128), (1, 256), (5, 4), (2, 6), (2, 3), (8, 64)];
    for dtype in DTYPES {
        for (i, (heads, dim)) in shapes.into_iter().enumerate() {
            let block_size = [16, 32][i % 2];
            let layout = KvLayout { num_blocks: 9, num_kv_heads: heads, block_size, head_dim: dim, dtype };
            let elems = 9 * layout.block_elems();
            let before: Vec<u8> = (0..2 * elems * dtype.size_bytes()).map(|i| (i * 31 % 251) as u8).collect();
            let (k_before, v_before) = before.split_at(before.len() / 2);
            // From one source twice, whole blocks, one slot, none, one less and one more than half.
            let half = block_size / 2;
            let size = block_size;
            let copies = [(0, 4, size), (0, 5, 1), (1, 6, 0), (2, 7, half - 1), (8, 3, half + 1)];
            for copies in [&copies[..], &copies[..1], &[]] {
                let (mut want_k, mut want_v) = (k_before.to_vec(), v_before.to_vec());
                for &(src, dst, slots) in copies {
                    for h in 0..heads {
                        let bytes = |block: usize| layout.elem(block, h, 0) * dtype.size_bytes();
                        let len = slots * dim * dtype.size_bytes();
                        for (want, from) in [(&mut want_k, k_before), (&mut want_v, v_before)] {
                            want[bytes(dst)..][..len].copy_from_slice(&from[bytes(src)..][..len]);
                        }
                    }
                }
                let what = format!("kv_copy_blocks {dtype} {heads} heads of {dim}, {} copies", copies.len());
                let copies: Vec<rksc_block_copy> = copies
                    .iter()
                    .map(|&(src, dst, slots)| rksc_block_copy {
                        src: src as u32,
                        dst: dst as u32,
                        num_slots: slots as u32,
                    })
                    .collect();
                for_each_device(&what, |dev| {
                    let (copies, mut k, mut v) = (dev.buffer(&copies)?, dev.buffer(k_before)?, dev.buffer(v_before)?);
                    let params = rksc_kv_copy_blocks_params {
                        copies: copies.ptr(),
                        k_cache: k.ptr_mut().cast(),
                        v_cache: v.ptr_mut().cast(),
                        num_copies: copies.len() as u32,
                        num_kv_heads: heads as u32,
                        block_size: block_size as u32,
                        head_dim: dim as u32,
                        dtype: dtype as u32,
                        reserved: 0,
                    };
                    dev.launch(dev.kernels().kv_copy_blocks, &params)?;
                    let (k, v) = (dev.to_vec(&k)?, dev.to_vec(&v)?);
                    assert!(k == want_k && v == want_v, "{what}");
                    Ok(k.iter().chain(&v).map(|&b| u32::from(b)).collect())
                });
            }
        }
    }
}
