use half::{bf16, f16};
use rksc::DType;
use rksc::backend::NO_RING_ROW;
use rksc::backend::cpu::elem::Elem;
use rksc::backend::cpu::elementwise::{SiluMulArgs, Table, embed, gather_rows, silu_mul};
use rksc::backend::cpu::norm::{AddRmsNormArgs, add_rms_norm};
use rksc::backend::cpu::pool::ThreadPool;
use rksc::backend::cpu::rope::{RopeAppendArgs, RopeScratch, kv_copy_blocks, rope_append};
use rksc::backend::cpu::simd::SimdLevel;
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
        let mut fill = Fill::new(hidden as u64);
        let before = fill.normals(rows * hidden, 2.0);
        let delta = fill.normals(rows * hidden, 0.5);
        let weight = fill.normals(hidden, 1.0);
        let run = |threads: usize, from: usize| {
            let (mut x, mut y, mut sim) = (before.clone(), vec![T::zeroed(); rows * hidden], vec![9.0; rows]);
            let mut kept = vec![9.0; rows * hidden];
            let args = AddRmsNormArgs {
                rows: from..rows,
                x: &mut x,
                delta: Some(&delta),
                weight: Some(&weight),
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
        let weight: Vec<f64> = wide(&weight);
        for (r, &sim) in sim.iter().enumerate() {
            let part = r * hidden..(r + 1) * hidden;
            let what = format!("add_rms_norm {level:?} {rows}x{hidden} row {r}");
            let want_x: Vec<f32> = part.clone().map(|i| before[i] + delta[i]).collect();
            assert_eq!(x[part.clone()], want_x, "{what}");
            let want = rounded(T::DTYPE, &oracle::rms_norm(&wide(&want_x), &weight, 1e-6));
            oracle::assert_close(&what, T::DTYPE, 2e-6, &wide(&y[part.clone()]), &want);
            let want = oracle::cosine(&wide(&before[part.clone()]), &wide(&want_x));
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
            weight: None,
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
            weight: Some(&[1.0, 2.0]),
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
            weight: Some(&[1.0, 2.0]),
            y: &mut y,
            keep: None,
            step_similarity: None,
            hidden: 2,
            eps: 0.0,
        };
        assert!(add_rms_norm(level, &mut pool, short).is_err());
    }
}

fn silu_case<T: Elem>(level: SimdLevel) {
    for (rows, n) in [(1, 5), (3, 48), (9, 130), (40, 512)] {
        let mut gate_up = Fill::new(n as u64).normals(rows * 2 * n, 4.0);
        gate_up[..5].copy_from_slice(&[100.0, -100.0, 0.0, -0.0, -20.0]);
        let run = |threads: usize| {
            let mut y = vec![T::zeroed(); rows * n];
            let args = SiluMulArgs { rows: 0..rows, gate_up: &gate_up, y: &mut y, intermediate: n };
            silu_mul(level, &mut ThreadPool::new(threads), args).unwrap();
            y
        };
        let y = run(1);
        let want: Vec<f64> = gate_up
            .chunks(2 * n)
            .flat_map(|row| (0..n).map(|i| oracle::silu_mul(f64::from(row[i]), f64::from(row[n + i]))))
            .collect();
        let what = format!("silu_mul {level:?} {rows}x{n}");
        // Rounding once: at most half a step of T, and f32 steps before it.
        oracle::assert_close(&what, T::DTYPE, 1e-5, &wide(&y), &rounded(T::DTYPE, &want));
        assert_eq!(run(2), y);
        assert_eq!(run(3), y);
    }
}

#[test]
fn silu_mul_matches_oracle() {
    everywhere!(silu_case);
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
            let mut x = vec![0.0; 45 * width];
            embed(level, &mut pool, Table::F32(&src), &ids, &mut x, width).unwrap();
            assert_eq!(x, want);
            embed(level, &mut pool, Table::Bf16(&half), &ids, &mut x, width).unwrap();
            assert!(x.iter().zip(&want).all(|(&x, &w)| x == bf16::from_f32(w).to_f32()));
            embed(level, &mut pool, Table::F16(&half_f16), &ids, &mut x, width).unwrap();
            assert!(x.iter().zip(&want).all(|(&x, &w)| x == f16::from_f32(w).to_f32()));
            assert!(embed(level, &mut pool, Table::F32(&src), &[50], &mut x, width).is_err());
        }
    }
}

fn rope_case<T: Elem>(level: SimdLevel) {
    for (hq, hkv, dim, norm) in
        [(4, 2, 32, false), (14, 2, 64, false), (3, 1, 80, true), (4, 4, 128, true), (2, 1, 6, true)]
    {
        let rows = 21;
        let layout = KvLayout { num_blocks: 5, num_kv_heads: hkv, block_size: 16, head_dim: dim, dtype: T::DTYPE };
        let mut fill = Fill::new(dim as u64);
        let width = (hq + 2 * hkv) * dim;
        let qkv = fill.normals(rows * width, 1.5);
        let (qw, kw) = (fill.normals(dim, 1.0), fill.normals(dim, 1.0));
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
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
                    rope_scale: 1.25,
                    q_norm: norm.then_some((qw.as_slice(), 1e-6)),
                    k_norm: norm.then_some((kw.as_slice(), 1e-6)),
                    num_q_heads: hq,
                    layout: &layout,
                };
                rope_append(level, &mut ThreadPool::new(threads), &mut scratch, args).unwrap();
            }
            (q, k, v, ring)
        };
        let (q, k, v, ring) = run(1, 0..rows);
        let head = |row: usize, h: usize| wide(&qkv[row * width + h * dim..][..dim]);
        for r in 0..rows {
            let what = format!("rope_append {level:?} {hq}/{hkv} heads of {dim}, row {r}");
            let rotated = |x: Vec<f64>, w: &[f32]| {
                let x = if norm { oracle::rms_norm(&x, &wide(w), 1e-6) } else { x };
                rounded(T::DTYPE, &oracle::rope(&x, positions[r], &inv_freq, 1.25))
            };
            for h in 0..hq {
                let got = wide(&q[(r * hq + h) * dim..][..dim]);
                oracle::assert_close(&what, T::DTYPE, 2e-6, &got, &rotated(head(r, h), &qw));
            }
            let slot = slots[r] as usize;
            for h in 0..hkv {
                let at = layout.elem(slot / 16, h, slot % 16);
                oracle::assert_close(&what, T::DTYPE, 2e-6, &wide(&k[at..at + dim]), &rotated(head(r, hq + h), &kw));
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
            rope_scale: 1.0,
            q_norm: None,
            k_norm: None,
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
