use half::{bf16, f16};
use rksc::DType;
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::elementwise::{EmbedArgs, GluArgs, Table, embed, gather_rows, glu, softcap};
use rksc::backend::cpu::norm::{AddRmsNormArgs, Output, add_rms_norm};
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::rope::{QkWeights, RopeAppendArgs, RopeScratch, kv_copy_blocks, rope_append};
use rksc::backend::cpu::simd::SimdLevel;
use rksc::backend::{Activation, NO_RING_ROW, NormSpan};
use rksc::kv::BlockCopy;
use rksc::kv::KvLayout;
use rksc::testing::fill::Fill;
use rksc::testing::oracle;

fn wide<T: Elem>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.widen())).collect()
}

fn rounded(dtype: DType, x: &[f64]) -> Vec<f64> {
    x.iter().map(|&x| oracle::round(dtype, x)).collect()
}

/// Calls `$f::<T>(level)` for every dtype and level.
macro_rules! everywhere {
    ($f:ident) => {
        for level in SimdLevel::available() {
            $f::<f32>(level);
            $f::<bf16>(level);
            $f::<f16>(level);
        }
    };
}

fn norm_case<T: Elem>(level: SimdLevel) {
    for (rows, hidden) in [(1, 7), (3, 64), (5, 97), (8, 896), (70, 256)] {
        for (post, normed) in [(false, true), (false, false), (true, true), (true, false)] {
            norm_rows::<T>(level, (rows, hidden), post, normed);
        }
    }
}

fn norm_rows<T: Elem>(level: SimdLevel, (rows, hidden): (usize, usize), post: bool, normed: bool) {
    let mut fill = Fill::new(hidden as u64);
    let before = fill.normals(rows * hidden, 2.0);
    let delta = fill.normals(rows * hidden, 0.5);
    let (weight, post_norm) = (fill.normals(hidden, 1.0), fill.normals(hidden, 1.0));
    let run = |threads: usize, from: usize| {
        let (mut x, mut y, mut sim) = (before.clone(), vec![T::zeroed(); rows * hidden], vec![9.0; rows]);
        let mut kept = vec![9.0; rows * hidden];
        let args = AddRmsNormArgs {
            rows: from..rows,
            x: &mut x,
            delta: Some(&delta),
            post_norm: post.then_some(&post_norm),
            output: if normed { Output::Normed(&weight) } else { Output::Rounded },
            y: &mut y,
            keep: Some(&mut kept),
            step_similarity: Some((&before, &mut sim)),
            hidden,
            eps: 1e-6,
        };
        add_rms_norm(level, &mut ThreadPool::new(threads), args).unwrap();
        assert_eq!(kept[from * hidden..], x[from * hidden..]);
        assert!(kept[..from * hidden].iter().chain(&sim[..from]).all(|&x| x == 9.0));
        (x, y, sim)
    };
    let (x, y, sim) = run(1, 0);
    for (r, &sim) in sim.iter().enumerate() {
        let part = r * hidden..(r + 1) * hidden;
        let what = format!("add_rms_norm {level:?} {rows}x{hidden} post {post} normed {normed} row {r}");
        let after = wide(&x[part.clone()]);
        let mut added = wide(&delta[part.clone()]);
        if post {
            added = oracle::rms_norm(&added, &wide(&post_norm), 1e-6);
        } else {
            let want: Vec<f32> = part.clone().map(|i| before[i] + delta[i]).collect();
            assert_eq!(x[part.clone()], want, "{what}");
        }
        let want: Vec<f64> = wide(&before[part.clone()]).iter().zip(&added).map(|(x, d)| x + d).collect();
        oracle::assert_close(&format!("{what}: x"), DType::F32, 2e-6, &after, &want);
        let got = wide(&y[part.clone()]);
        if normed {
            let want = rounded(T::DTYPE, &oracle::rms_norm(&after, &wide(&weight), 1e-6));
            oracle::assert_close(&what, T::DTYPE, 2e-6, &got, &want);
        } else {
            assert_eq!(got, rounded(T::DTYPE, &after), "{what}");
        }
        let want = oracle::cosine(&wide(&before[part.clone()]), &after);
        assert!((f64::from(sim) - want).abs() < 1e-6, "{what}: {sim} {want}");
    }
    for threads in 2..4 {
        assert_eq!(run(threads, 0), (x.clone(), y.clone(), sim.clone()));
    }
    let (x1, y1, sim1) = run(1, rows - 1);
    let last = (rows - 1) * hidden;
    assert_eq!((&x1[last..], &y1[last..], sim1[rows - 1]), (&x[last..], &y[last..], sim[rows - 1]));
    assert_eq!(x1[..last], before[..last]);
}

#[test]
fn add_rms_norm_matches_oracle() {
    everywhere!(norm_case);
}

#[test]
fn add_rms_norm_without_its_options() {
    for level in SimdLevel::available() {
        let mut pool = ThreadPool::new(1);
        let before = [0.0, 3.0, 0.0, 4.0];
        let mut x = before.to_vec();
        let mut y = vec![7.0f32; 4];
        let mut sim = [9.0; 2];
        let delta = [1.0, 0.0, 0.0, -4.0];
        let args = AddRmsNormArgs {
            rows: 0..2,
            x: &mut x,
            delta: Some(&delta),
            post_norm: None,
            output: Output::None,
            y: &mut y,
            keep: None,
            step_similarity: Some((&before, &mut sim)),
            hidden: 2,
            eps: 0.0,
        };
        add_rms_norm(level, &mut pool, args).unwrap();
        assert_eq!((x.as_slice(), y.as_slice()), ([1.0, 3.0, 0.0, 0.0].as_slice(), [7.0; 4].as_slice()));
        assert!((sim[0] - 3.0 / 10f32.sqrt()).abs() < 1e-6);
        assert_eq!(sim[1], 0.0);
        let args = AddRmsNormArgs {
            rows: 0..1,
            x: &mut x,
            delta: None,
            post_norm: Some(&[3.0, 3.0]),
            output: Output::Normed(&[1.0, 2.0]),
            y: &mut y,
            keep: None,
            step_similarity: None,
            hidden: 2,
            eps: 0.0,
        };
        add_rms_norm(level, &mut pool, args).unwrap();
        assert!((y[0] - 1.0 / 5f32.sqrt()).abs() < 1e-6 && (y[1] - 6.0 / 5f32.sqrt()).abs() < 1e-6, "{y:?}");
        let short = AddRmsNormArgs {
            rows: 0..3,
            x: &mut x,
            delta: None,
            post_norm: Some(&[3.0, 3.0]),
            output: Output::Normed(&[1.0, 2.0]),
            y: &mut y,
            keep: None,
            step_similarity: None,
            hidden: 2,
            eps: 0.0,
        };
        assert!(add_rms_norm(level, &mut pool, short).is_err());
    }
}

fn glu_case<T: Elem>(level: SimdLevel) {
    for (i, (rows, n)) in [(1, 5), (3, 48), (9, 130), (40, 512)].into_iter().cycle().take(8).enumerate() {
        let activation = if i < 4 { Activation::Silu } else { Activation::GeluTanh };
        let mut gate_up = Fill::new(n as u64).normals(rows * 2 * n, 4.0);
        gate_up[..5].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, -20.0]);
        let run = |threads: usize| {
            let mut y = vec![T::zeroed(); rows * n];
            let args = GluArgs { rows: 0..rows, gate_up: &gate_up, y: &mut y, intermediate: n, activation };
            glu(level, &mut ThreadPool::new(threads), args).unwrap();
            y
        };
        let y = run(1);
        let want: Vec<f64> = gate_up
            .chunks(2 * n)
            .flat_map(|row| (0..n).map(|i| oracle::glu(activation, f64::from(row[i]), f64::from(row[n + i]))))
            .collect();
        let what = format!("glu {activation:?} {level:?} {rows}x{n}");
        // Rounding once: at most half a step of T, and f32 steps before it.
        oracle::assert_close(&what, T::DTYPE, 1e-5, &wide(&y), &rounded(T::DTYPE, &want));
        assert_eq!(run(2), y);
        assert_eq!(run(3), y);
    }
}

#[test]
fn glu_matches_oracle() {
    everywhere!(glu_case);
}

#[test]
fn softcap_matches_oracle() {
    for level in SimdLevel::available() {
        for (rows, vocab, cap) in [(1, 1, 30.0), (3, 7, 0.5), (2, 64, 30.0), (5, 97, 50.0), (40, 1003, 1.0)] {
            let mut before = Fill::new(vocab as u64).normals(rows * vocab, 40.0);
            before[0] = 1e-3;
            before[rows * vocab - 1] = -1e30;
            let run = |threads: usize| {
                let mut logits = before.clone();
                softcap(level, &mut ThreadPool::new(threads), &mut logits, vocab, cap);
                logits
            };
            let logits = run(1);
            for (&x, &got) in before.iter().zip(&logits) {
                let want = oracle::softcap(f64::from(cap), f64::from(x));
                let off = (f64::from(got) - want).abs();
                assert!(off <= 6e-7 * want.abs(), "softcap {cap} {level:?} of {x}: {got}, {want}");
            }
            assert_eq!(run(2), logits);
        }
        let mut odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0];
        softcap(level, &mut ThreadPool::new(1), &mut odd, 4, 30.0);
        assert!(odd[0].is_nan() && odd[1..] == [30.0, -30.0, 0.0], "{odd:?}");
    }
}

#[test]
fn gather_rows_and_embed_copy_rows() {
    for threads in 1..3 {
        let mut pool = ThreadPool::new(threads);
        let (vocab, width) = (50, 403);
        let src = Fill::new(1).normals(vocab * width, 1.0);
        let ids: Vec<u32> = (0..45).map(|i| (i * 7 % 50) as u32).collect();
        let want: Vec<f32> = ids.iter().flat_map(|&i| &src[i as usize * width..][..width]).copied().collect();
        let mut dst = vec![0.0; 45 * width];
        gather_rows(&mut pool, &ids, &src, &mut dst, width).unwrap();
        assert_eq!(dst, want);
        assert!(gather_rows(&mut pool, &[50], &src, &mut dst, width).is_err());
        for level in SimdLevel::available() {
            let half: Vec<bf16> = src.iter().map(|&x| bf16::from_f32(x)).collect();
            let half_f16: Vec<f16> = src.iter().map(|&x| f16::from_f32(x)).collect();
            for scale in [1.0, 29.933_259] {
                let mut run = |table: Table<'_>, ids: &[u32]| {
                    let mut x = vec![0.0; 45 * width];
                    embed(level, &mut pool, EmbedArgs { table, ids, scale, x: &mut x, hidden: width }).map(|()| x)
                };
                let scaled = |of: fn(f32) -> f32| -> Vec<f32> { want.iter().map(|&w| of(w) * scale).collect() };
                assert_eq!(run(Table::F32(&src), &ids).unwrap(), scaled(|w| w));
                assert_eq!(run(Table::Bf16(&half), &ids).unwrap(), scaled(|w| bf16::from_f32(w).to_f32()));
                assert_eq!(run(Table::F16(&half_f16), &ids).unwrap(), scaled(|w| f16::from_f32(w).to_f32()));
                assert!(run(Table::F32(&src), &[50]).is_err());
            }
        }
    }
}

fn rope_case<T: Elem>(level: SimdLevel) {
    const HEAD: Option<NormSpan> = Some(NormSpan::Head);
    const ROW: Option<NormSpan> = Some(NormSpan::Row);
    // Halves of rotary_dim and rests of the head off any vector's width, and rests shorter than one.
    for (hq, hkv, dim, rotary_dim, norm) in [
        (4, 2, 32, 32, None),
        (14, 2, 64, 64, None),
        (3, 1, 80, 80, HEAD),
        (4, 4, 128, 128, HEAD),
        (2, 1, 6, 6, HEAD),
        (4, 2, 128, 96, None),
        (5, 1, 80, 38, HEAD),
        (4, 2, 64, 62, ROW),
        (3, 3, 10, 2, ROW),
        (2, 2, 128, 128, ROW),
    ] {
        let rows = 21;
        let layout = KvLayout { num_blocks: 5, num_kv_heads: hkv, block_size: 16, head_dim: dim, dtype: T::DTYPE };
        let mut fill = Fill::new(dim as u64);
        let width = (hq + 2 * hkv) * dim;
        let qkv = fill.normals(rows * width, 1.5);
        let (q_span, k_span) = if norm == ROW { (hq, hkv) } else { (1, 1) };
        let (qw, kw) = (fill.normals(q_span * dim, 1.0), fill.normals(k_span * dim, 1.0));
        let inv_freq: Vec<f32> =
            (0..rotary_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary_dim as f32)).collect();
        let positions: Vec<u32> = (0..rows as u32).map(|r| r % 5 * 700 + r / 10).collect();
        let slots = fill.shuffled(80)[..rows].to_vec();
        // Every third row's q is not kept; the ring has rows that nobody writes.
        let mut ring_rows = fill.shuffled(rows + 4)[..rows].to_vec();
        for row in ring_rows.iter_mut().step_by(3) {
            *row = NO_RING_ROW;
        }
        let ring_before: Vec<T> = fill.normals((rows + 4) * hq * dim, 1.0).into_iter().map(T::narrow).collect();
        let run = |threads: usize, part: std::ops::Range<usize>| {
            let mut q = vec![T::zeroed(); rows * hq * dim];
            let mut k = vec![T::zeroed(); 5 * layout.block_elems()];
            let mut v = k.clone();
            let mut ring = ring_before.clone();
            let mut scratch = RopeScratch::default();
            for _ in 0..2 {
                let args = RopeAppendArgs {
                    rows: part.clone(),
                    qkv: &qkv,
                    q: &mut q,
                    query_ring: Some(&mut ring),
                    k_cache: &mut k,
                    v_cache: &mut v,
                    positions: &positions,
                    slots: &slots,
                    ring_rows: &ring_rows,
                    inv_freq: &inv_freq,
                    rotary_dim,
                    rope_scale: 1.25,
                    qk_norm: norm.map(|span| QkWeights { q: &qw, k: &kw, eps: 1e-6, span }),
                    num_q_heads: hq,
                    layout: &layout,
                };
                rope_append(level, &mut ThreadPool::new(threads), &mut scratch, args).unwrap();
            }
            (q, k, v, ring)
        };
        let (q, k, v, ring) = run(1, 0..rows);
        let head = |row: usize, h: usize| wide(&qkv[row * width + h * dim..][..dim]);
        // Heads [first, first + span) of a row, of which one is looked at.
        let normed = |row: usize, h: usize, (first, span): (usize, usize), w: &[f32]| match norm {
            None => head(row, h),
            Some(NormSpan::Head) => oracle::rms_norm(&head(row, h), &wide(w), 1e-6),
            Some(NormSpan::Row) => {
                let all = wide(&qkv[row * width + first * dim..][..span * dim]);
                oracle::rms_norm(&all, &wide(w), 1e-6)[(h - first) * dim..][..dim].to_vec()
            }
        };
        for r in 0..rows {
            let what = format!("rope_append {level:?} {hq}/{hkv} heads of {rotary_dim}/{dim}, {norm:?}, row {r}");
            let rotated = |x: Vec<f64>| rounded(T::DTYPE, &oracle::rope(&x, positions[r], &inv_freq, 1.25));
            for h in 0..hq {
                let got = wide(&q[(r * hq + h) * dim..][..dim]);
                oracle::assert_close(&what, T::DTYPE, 2e-6, &got, &rotated(normed(r, h, (0, hq), &qw)));
                if norm.is_none() {
                    assert_eq!(got[rotary_dim..], rounded(T::DTYPE, &head(r, h)[rotary_dim..]), "{what}: what passes");
                }
            }
            let slot = slots[r] as usize;
            for h in 0..hkv {
                let at = layout.elem(slot / 16, h, slot % 16);
                let want = rotated(normed(r, hq + h, (hq, hkv), &kw));
                oracle::assert_close(&what, T::DTYPE, 2e-6, &wide(&k[at..at + dim]), &want);
                assert_eq!(wide(&v[at..at + dim]), rounded(T::DTYPE, &head(r, hq + hkv + h)), "{what}");
            }
        }
        let mut want_ring = ring_before.clone();
        for (row, &kept) in q.chunks_exact(hq * dim).zip(&ring_rows).filter(|&(_, &kept)| kept != NO_RING_ROW) {
            want_ring[kept as usize * hq * dim..][..hq * dim].copy_from_slice(row);
        }
        assert_eq!(ring, want_ring);
        assert_eq!(run(2, 0..rows), (q.clone(), k, v, ring));
        assert_eq!(run(1, 7..8).0[7 * hq * dim..8 * hq * dim], q[7 * hq * dim..8 * hq * dim]);
    }
}

#[test]
fn rope_append_matches_oracle() {
    everywhere!(rope_case);
}

#[test]
fn rope_append_refuses_rows_named_twice_and_rings_too_small() {
    let layout = KvLayout { num_blocks: 1, num_kv_heads: 1, block_size: 16, head_dim: 2, dtype: DType::F32 };
    let run = |slots: [u32; 2], ring_rows: &[u32], ring: Option<usize>| {
        let (mut q, mut k, mut v) = (vec![0f32; 4], vec![0f32; 32], vec![0f32; 32]);
        let mut ring = ring.map(|rows| vec![0f32; 2 * rows]);
        let args = RopeAppendArgs {
            rows: 0..2,
            qkv: &[0.0; 12],
            q: &mut q,
            query_ring: ring.as_deref_mut(),
            k_cache: &mut k,
            v_cache: &mut v,
            positions: &[0, 1],
            slots: &slots,
            ring_rows,
            inv_freq: &[1.0],
            rotary_dim: 2,
            rope_scale: 1.0,
            qk_norm: None,
            num_q_heads: 1,
            layout: &layout,
        };
        rope_append(SimdLevel::Portable, &mut ThreadPool::new(1), &mut RopeScratch::default(), args)
    };
    const NONE: u32 = NO_RING_ROW;
    for (slots, ring_rows, ring) in [
        ([3, 4], &[][..], None),
        ([3, 4], &[], Some(0)),
        ([3, 4], &[NONE, NONE], None),
        ([3, 4], &[1, 0], Some(2)),
        ([3, 4], &[NONE, 1], Some(2)),
    ] {
        run(slots, ring_rows, ring).unwrap();
    }
    for (slots, ring_rows, ring) in [
        ([3, 3], &[][..], None),
        ([3, 4], &[1, 1], Some(2)),
        ([3, 4], &[1], Some(2)),
        ([3, 4], &[0, 2], Some(2)),
        ([3, 4], &[0, NONE], None),
    ] {
        assert!(run(slots, ring_rows, ring).is_err(), "{slots:?} {ring_rows:?} {ring:?}");
    }
}

#[test]
fn kv_copy_blocks_copies_the_head_of_a_block() {
    let layout = KvLayout { num_blocks: 4, num_kv_heads: 2, block_size: 16, head_dim: 4, dtype: DType::F32 };
    let before = Fill::new(3).normals(4 * layout.block_elems(), 1.0);
    let (mut k, mut v) = (before.clone(), before.clone());
    let copies = [BlockCopy { src: 0, dst: 2, num_slots: 5 }, BlockCopy { src: 0, dst: 3, num_slots: 16 }];
    kv_copy_blocks(&copies, &mut k, &mut v, &layout).unwrap();
    assert_eq!(k, v);
    for block in 0..4 {
        for h in 0..2 {
            for slot in 0..16 {
                let copied = block == 3 || block == 2 && slot < 5;
                let from = layout.elem(if copied { 0 } else { block }, h, slot);
                assert_eq!(k[layout.elem(block, h, slot)..][..4], before[from..from + 4]);
            }
        }
    }
    assert!(kv_copy_blocks(&[BlockCopy { src: 0, dst: 4, num_slots: 1 }], &mut k, &mut v, &layout).is_err());
}
