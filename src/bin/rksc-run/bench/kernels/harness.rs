//! What the cases have in common: data on the device whose values the host knows, and the clock.
//!
//! *Time.* A case's launches are captured in a graph, `copies` sets of inputs in turn, so many times over that a sample
//! lasts half a millisecond at least; a sample is the time between two events around one replay, divided by its
//! launches. The sets together are larger than any L2 where the op's input comes from memory in a step of a model.
//!
//! *Data.* Near-normal values that repeat with a prime period, shifted from buffer to buffer: no two rows are alike, and
//! the host can look up any element without reading a gigabyte back.

use std::collections::HashMap;
use std::ffi::c_void;
use std::rc::Rc;

use half::{bf16, f16};
use rksc::DType;
use rksc::backend::cuda::device::{Device, DeviceBuf, Graph};
use rksc::model::family::ModelConfig;
use rksc::report::LatencyMs;
use rksc::testing::fill::Fill;
use rksc::testing::linear_quantised::without_nan;
use rksc::testing::round_to;

use super::report::{Measured, Report, Sink, Times};

/// What activations, weights and KV are rounded to.
pub(super) const COMPUTE: DType = DType::Bf16;
/// Twice the largest L2 there is (126 MB).
const ROTATE_BYTES: usize = 256 << 20;
const SAMPLES: usize = 40;
const SAMPLE_US: f64 = 500.0;
const WARM_UP: usize = 3;
/// Elements after which data repeats; a prime.
const PERIOD: usize = 1_048_573;
const COPY_BYTES: usize = 1 << 30;

pub(super) struct Bench {
    pub(super) dev: Device,
    pub(super) sink: Sink,
    pub(super) reports: Vec<Report>,
    pub(super) timed: bool,
    /// Bytes a second of a copy, read and write counted.
    copy: Option<f64>,
    pools: HashMap<Kind, Pool>,
    shift: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Normal(DType),
    Words,
}

/// One period of data, on both sides.
struct Pool {
    values: Rc<Vec<f32>>,
    words: Rc<Vec<u32>>,
    memory: DeviceBuf<u8>,
}

/// Data on the device.
pub(super) struct Noise {
    pub(super) memory: DeviceBuf<u8>,
    values: Rc<Vec<f32>>,
    shift: usize,
    size: usize,
}

/// Random words on the device.
pub(super) struct Words {
    pub(super) memory: DeviceBuf<u8>,
    words: Rc<Vec<u32>>,
    shift: usize,
}

impl Bench {
    pub(super) fn new(dev: Device, timed: bool, sink: Sink) -> Self {
        Self { dev, sink, reports: Vec::new(), timed, copy: None, pools: HashMap::new(), shift: 0 }
    }

    /// The models whose shapes are run.
    pub(super) fn models(&self) -> anyhow::Result<Vec<(&'static str, ModelConfig)>> {
        if self.timed {
            return ["qwen2.5-7b", "llama-3-8b"]
                .map(|name| Ok((name, ModelConfig::shape(name)?)))
                .into_iter()
                .collect();
        }
        let mut tiny = ModelConfig::shape("tiny")?;
        (tiny.head_dim, tiny.hidden) = (32, 128);
        Ok(vec![("tiny", tiny)])
    }

    /// `timed` where it counts, else `tiny`.
    pub(super) fn sizes<'a>(&self, timed: &'a [usize], tiny: &'a [usize]) -> &'a [usize] {
        if self.timed { timed } else { tiny }
    }

    /// Sets of inputs of so many bytes that together come from memory.
    pub(super) fn copies(&self, bytes: usize) -> usize {
        if self.timed { ROTATE_BYTES.div_ceil(bytes.max(1)) } else { 1 }
    }

    /// Runs a case and reports it. A failure is a report too, unless the device did not survive it.
    pub(super) fn case(
        &mut self,
        op: &'static str,
        shape: String,
        dtype: DType,
        case: impl FnOnce(&mut Self) -> anyhow::Result<Measured>,
    ) -> anyhow::Result<()> {
        let mut report = Report::of(op, shape, dtype);
        match case(self) {
            Ok(measured) => report.fill(measured, self.copy),
            Err(e) => report.failed = Some(format!("{e:#}")),
        }
        if self.sink.table {
            say!("{report}");
        }
        self.sink.line(&report)?;
        self.reports.push(report);
        self.dev.free_bytes()?;
        Ok(())
    }

    // ---- data ---------------------------------------------------------------------------------------------------

    /// Makes the pool that is not there yet.
    fn pool(&mut self, kind: Kind) -> anyhow::Result<()> {
        if !self.pools.contains_key(&kind) {
            let period = if self.timed { PERIOD } else { 65_521 };
            let mut fill = Fill::new(7);
            let (mut values, mut words) = (Vec::new(), Vec::new());
            let bytes = match kind {
                Kind::Normal(dtype) => {
                    values = round_to(&fill.normals(period, 1.0), dtype);
                    narrowed(dtype, &values)
                }
                Kind::Words => {
                    words.extend((0..period).map(|_| without_nan(fill.next_u64() as u32)));
                    bytemuck::cast_slice(&words).to_vec()
                }
            };
            let memory = self.dev.buffer(&bytes)?;
            self.pools.insert(kind, Pool { values: Rc::new(values), words: Rc::new(words), memory });
        }
        Ok(())
    }

    /// `len` elements of `size` bytes from the pool, from a place of their own on.
    fn tiled(&mut self, kind: Kind, len: usize, size: usize) -> anyhow::Result<(DeviceBuf<u8>, usize)> {
        self.pool(kind)?;
        let pool = &self.pools[&kind];
        let period = pool.memory.len() / size;
        self.shift = (self.shift + 104_729) % period;
        let mut memory = self.dev.alloc::<u8>(len * size)?;
        let (mut to, mut from) = (0, self.shift);
        while to < len {
            let count = (period - from).min(len - to);
            self.dev.copy(&pool.memory, from * size..(from + count) * size, &mut memory, to * size)?;
            (to, from) = (to + count, 0);
        }
        Ok((memory, self.shift))
    }

    /// `len` values near N(0, 1).
    pub(super) fn noise(&mut self, dtype: DType, len: usize) -> anyhow::Result<Noise> {
        let kind = Kind::Normal(dtype);
        let (memory, shift) = self.tiled(kind, len, dtype.size_bytes())?;
        Ok(Noise { memory, values: Rc::clone(&self.pools[&kind].values), shift, size: dtype.size_bytes() })
    }

    /// `len` random words, each byte of which is an E4M3 number.
    pub(super) fn words(&mut self, len: usize) -> anyhow::Result<Words> {
        let (memory, shift) = self.tiled(Kind::Words, len, 4)?;
        Ok(Words { memory, words: Rc::clone(&self.pools[&Kind::Words].words), shift })
    }

    /// Memory for results, NaN throughout, so that what an op leaves out shows.
    pub(super) fn results(&mut self, bytes: usize) -> anyhow::Result<DeviceBuf<u8>> {
        Ok(self.dev.buffer(&vec![0xff; bytes])?)
    }

    /// Elements `[start, start + len)`, widened.
    pub(super) fn read(
        &mut self,
        dtype: DType,
        src: &DeviceBuf<u8>,
        start: usize,
        len: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let size = dtype.size_bytes();
        let mut bytes = vec![0; len * size];
        self.dev.download(src, start * size, &mut bytes)?;
        Ok(widened(dtype, &bytes))
    }

    // ---- time ---------------------------------------------------------------------------------------------------

    /// Times `run`, which is given the number of the set of inputs to use.
    pub(super) fn time(
        &mut self,
        copies: usize,
        mut run: impl FnMut(&mut Device, usize) -> rksc::Result<()>,
    ) -> anyhow::Result<Option<Times>> {
        if !self.timed {
            return Ok(None);
        }
        let dev = &mut self.dev;
        let mut record = |dev: &mut Device, launches: usize| -> rksc::Result<Graph> {
            dev.begin_capture()?;
            let ran = (0..launches).try_for_each(|i| run(dev, i % copies));
            let graph = dev.end_capture();
            ran.and(graph)
        };
        let once = record(dev, copies)?;
        sample(dev, &once)?;
        let rounds = (SAMPLE_US / sample(dev, &once)?.max(1.0)).ceil().clamp(1.0, 512.0) as usize;
        let launches = copies * rounds;
        let graph = record(dev, launches)?;
        for _ in 0..WARM_UP {
            sample(dev, &graph)?;
        }
        let us =
            (0..SAMPLES).map(|_| Ok(sample(dev, &graph)? / launches as f64)).collect::<rksc::Result<Vec<f64>>>()?;
        Ok(Some(Times { us: LatencyMs::of(&us), launches, samples: SAMPLES }))
    }

    /// The device's copy bandwidth, where times count.
    pub(super) fn measure_copy(&mut self) -> anyhow::Result<Option<f64>> {
        let len = COPY_BYTES.min(self.dev.free_bytes()? as usize / 8);
        if !self.timed {
            return Ok(None);
        }
        let src = self.noise(COMPUTE, len / 2)?.memory;
        let mut dst = self.dev.alloc::<u8>(src.len())?;
        let times = self.time(1, |dev, _| dev.copy(&src, 0..src.len(), &mut dst, 0))?;
        self.copy = times.map(|t| 2.0 * src.len() as f64 / t.us.p50 * 1e6);
        Ok(self.copy)
    }
}

/// Microseconds of one replay.
fn sample(dev: &mut Device, graph: &Graph) -> rksc::Result<f64> {
    let from = dev.mark()?;
    graph.launch(dev)?;
    let to = dev.mark()?;
    dev.micros(&from, &to)
}

impl Noise {
    /// Element `i`.
    pub(super) fn at(&self, i: usize) -> f32 {
        self.values[(i + self.shift) % self.values.len()]
    }

    /// Elements `[start, start + len)`.
    pub(super) fn wide(&self, start: usize, len: usize) -> Vec<f64> {
        (start..start + len).map(|i| f64::from(self.at(i))).collect()
    }

    /// The same, as they are.
    pub(super) fn floats(&self, start: usize, len: usize) -> Vec<f32> {
        (start..start + len).map(|i| self.at(i)).collect()
    }

    /// The address of element `i`, for params.
    pub(super) fn ptr(&self, i: usize) -> *const c_void {
        self.memory.ptr().wrapping_add(i * self.size).cast()
    }

    /// The same, to be written through.
    pub(super) fn ptr_mut(&mut self, i: usize) -> *mut c_void {
        self.memory.ptr_mut().wrapping_add(i * self.size).cast()
    }

    /// Sum over k of x_k times element `start + k`.
    pub(super) fn dot(&self, start: usize, x: &[f64]) -> f64 {
        let period = self.values.len();
        let (mut sum, mut done) = (0.0, 0);
        while done < x.len() {
            let from = (start + done + self.shift) % period;
            let count = (period - from).min(x.len() - done);
            let pairs = self.values[from..from + count].iter().zip(&x[done..done + count]);
            sum += pairs.map(|(&w, x)| f64::from(w) * x).sum::<f64>();
            done += count;
        }
        sum
    }
}

impl Words {
    pub(super) fn at(&self, i: usize) -> u32 {
        self.words[(i + self.shift) % self.words.len()]
    }

    pub(super) fn ptr(&self, i: usize) -> *const u32 {
        self.memory.ptr().cast::<u32>().wrapping_add(i)
    }
}

/// `x` in `dtype`.
pub(super) fn narrowed(dtype: DType, x: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => x.iter().flat_map(|x| x.to_ne_bytes()).collect(),
        DType::Bf16 => x.iter().flat_map(|&x| bf16::from_f32(x).to_ne_bytes()).collect(),
        DType::F16 => x.iter().flat_map(|&x| f16::from_f32(x).to_ne_bytes()).collect(),
    }
}

fn widened(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|b| f64::from(f32::from_ne_bytes([b[0], b[1], b[2], b[3]]))).collect(),
        DType::Bf16 => halves().map(|b| bf16::from_ne_bytes(b).to_f64()).collect(),
        DType::F16 => halves().map(|b| f16::from_ne_bytes(b).to_f64()).collect(),
    }
}
