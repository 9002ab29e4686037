//! The device layer itself, through the smallest ops: memory, launches, faults, graphs.

use rksc::Error;
use rksc::backend::Activation;
use rksc::backend::cuda::bindings::{RKSC_SILU, rksc_gather_rows_params, rksc_glu_params};
use rksc::backend::cuda::device::{Device, DeviceBuf};
use rksc::testing::fill::Fill;
use rksc::testing::oracle;

use crate::device::{DTYPES, assert_refused, bits, for_each_device, wide, widened};

#[test]
fn glu_runs_on_every_device() {
    for dtype in DTYPES {
        for (rows, n) in [(0, 16), (1, 1), (3, 48), (9, 130)] {
            let what = format!("glu {dtype} {rows}x{n}");
            let gate_up = Fill::new(n as u64).normals(rows * 2 * n, 4.0);
            let want: Vec<f64> = gate_up
                .chunks(2 * n)
                .flat_map(|row| (0..n).map(|i| oracle::glu(Activation::Silu, f64::from(row[i]), f64::from(row[n + i]))))
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
                    activation: RKSC_SILU,
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

fn gather(
    rows: &DeviceBuf<u32>,
    src: &DeviceBuf<f32>,
    dst: &mut DeviceBuf<f32>,
    width: u32,
) -> rksc_gather_rows_params {
    rksc_gather_rows_params { rows: rows.ptr(), src: src.ptr(), dst: dst.ptr_mut(), num_rows: rows.len() as u32, width }
}

#[test]
fn a_graph_runs_later_and_again_over_the_same_memory() {
    for_each_device("graph", |dev| {
        let mut rows = dev.buffer(&[2u32, 0])?;
        let src = dev.buffer(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
        let (mut dst, mut twice, mut zeros) = (dev.buffer(&[9.0f32; 4])?, dev.zeroed(4)?, dev.buffer(&[1.0f32; 3])?);
        dev.begin_capture()?;
        assert!(dev.alloc::<f32>(1).is_err() && dev.synchronize().is_err() && dev.begin_capture().is_err());
        let params = gather(&rows, &src, &mut dst, 2);
        dev.launch(dev.kernels().gather_rows, &params)?;
        dev.copy(&dst, 1..4, &mut twice, 0)?;
        dev.zero(&mut zeros)?;
        let graph = dev.end_capture()?;
        assert_eq!((dev.to_vec(&dst)?, dev.to_vec(&zeros)?), (vec![9.0; 4], vec![1.0; 3]), "nothing has run yet");
        graph.launch(dev)?;
        assert_eq!(dev.to_vec(&dst)?, [5.0, 6.0, 1.0, 2.0]);
        assert_eq!((dev.to_vec(&twice)?, dev.to_vec(&zeros)?), (vec![6.0, 1.0, 2.0, 0.0], vec![0.0; 3]));
        dev.upload(&mut rows, 1, &[1])?;
        graph.launch(dev)?;
        let twice = dev.to_vec(&twice)?;
        assert_eq!(twice, [6.0, 3.0, 4.0, 0.0]);
        Ok(bits(&twice))
    });
}

#[test]
fn copies_stay_inside_their_buffers() {
    for_each_device("bounds", |dev| {
        let mut x = dev.buffer(&[1.0f32, 2.0, 3.0])?;
        let mut out = [0.0; 2];
        assert!(dev.upload(&mut x, 2, &[0.0, 0.0]).is_err());
        assert!(dev.download(&x, usize::MAX, &mut out).is_err());
        let y = dev.buffer(&[7.0f32; 2])?;
        assert!(dev.copy(&y, 1..3, &mut x, 0).is_err() && dev.copy(&y, 0..2, &mut x, 2).is_err());
        dev.copy(&y, 0..1, &mut x, 2)?;
        assert_eq!(dev.to_vec(&x)?, [1.0, 2.0, 7.0]);
        assert!(dev.alloc::<f32>(usize::MAX / 2).is_err());
        let empty = dev.alloc::<u32>(0)?;
        assert!(empty.is_empty() && !empty.ptr().is_null() && dev.to_vec(&empty)?.is_empty());
        assert_eq!(dev.zeroed::<u8>(300)?.ptr().addr() % 256, 0);
        Ok(Vec::new())
    });
}

/// Past the size of a GPU's staging memory, and many small ones that share it.
#[test]
fn uploads_of_any_size_arrive_whole() {
    for_each_device("uploads", |dev| {
        let large: Vec<u32> = (0..2_500_001).collect();
        let mut x = dev.buffer(&large)?;
        for i in 0..40_000 {
            dev.upload(&mut x, i * 50, &[u32::MAX - i as u32])?;
        }
        let got = dev.to_vec(&x)?;
        let want = |i: usize| if i.is_multiple_of(50) && i < 2_000_000 { u32::MAX - (i / 50) as u32 } else { i as u32 };
        assert!(got.iter().enumerate().all(|(i, &x)| x == want(i)));
        Ok(Vec::new())
    });
}

#[test]
fn params_past_a_limit_are_refused_and_the_device_lives() {
    for_each_device("refused", |dev| {
        let params = rksc_glu_params { num_rows: 1, intermediate: 1, dtype: 9, ..Default::default() };
        assert_refused(dev.launch(dev.kernels().glu, &params));
        dev.synchronize()?;
        Ok(Vec::new())
    });
}

/// On the emulation alone: a GPU context would be lost for every other test.
#[test]
fn a_fault_is_reported_and_loses_the_device() {
    let mut dev = Device::emulated().unwrap();
    let (rows, src) = (dev.buffer(&[0u32, 3]).unwrap(), dev.buffer(&[0.0f32; 6]).unwrap());
    assert!(!dev.alloc::<f32>(2).unwrap().ptr().is_null());
    assert!(dev.to_vec(&dev.alloc::<f32>(2).unwrap()).unwrap().iter().all(|x| x.is_nan()));
    let mut dst = dev.zeroed(4).unwrap();
    let params = gather(&rows, &src, &mut dst, 2);
    let error = dev.launch(dev.kernels().gather_rows, &params).unwrap_err();
    assert_eq!(error.code(), rksc::ErrorCode::Device);
    let Error::Cuda { op: "gather_rows", what, .. } = &error else { panic!("{error}") };
    assert!(what.contains("out of bounds"), "{what}");
    let later = dev.synchronize().unwrap_err().to_string();
    assert!(later.contains("lost"), "{later}");
    assert!(dev.alloc::<f32>(1).is_err());
}
