//! What a case found, and its line: in the table, in the file, in the JSON.

use std::fmt;
use std::fs::File;
use std::io::Write;

use rksc::DType;
use rksc::report::LatencyMs;

/// Where reports go as they come.
pub(super) struct Sink {
    pub(super) out: Option<File>,
    pub(super) table: bool,
}

impl Sink {
    /// One line of the file.
    pub(super) fn line(&mut self, value: &impl serde::Serialize) -> anyhow::Result<()> {
        if let Some(out) = &mut self.out {
            let mut bytes = serde_json::to_vec(value)?;
            bytes.push(b'\n');
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// What a case found.
pub(super) struct Measured {
    pub(super) bytes: usize,
    /// 0 where arithmetic cannot matter.
    pub(super) flops: usize,
    pub(super) error: f64,
    pub(super) tolerance: f64,
    pub(super) times: Option<Times>,
}

/// Of one launch.
pub(super) struct Times {
    pub(super) us: LatencyMs,
    /// Launches a sample.
    pub(super) launches: usize,
    pub(super) samples: usize,
}

/// One case's line.
#[derive(serde::Serialize)]
pub(super) struct Report {
    op: &'static str,
    shape: String,
    dtype: DType,
    us: Option<LatencyMs>,
    samples: usize,
    launches_a_sample: usize,
    bytes: usize,
    gb_per_s: Option<f64>,
    of_copy: Option<f64>,
    flops: usize,
    tflops: Option<f64>,
    error: Option<f64>,
    pub(super) right: bool,
    pub(super) failed: Option<String>,
}

/// The norm of the difference over the norm of `want`; not a number where `got` holds none.
pub(super) fn error(got: &[f64], want: &[f64]) -> f64 {
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(g, w)| g - w));
    if off == 0.0 && got.len() == want.len() { 0.0 } else { off / norm(&mut want.iter().copied()) }
}

impl Report {
    /// Of a case that has not run yet.
    pub(super) fn of(op: &'static str, shape: String, dtype: DType) -> Self {
        Self {
            op,
            shape,
            dtype,
            us: None,
            samples: 0,
            launches_a_sample: 0,
            bytes: 0,
            gb_per_s: None,
            of_copy: None,
            flops: 0,
            tflops: None,
            error: None,
            right: false,
            failed: None,
        }
    }

    /// Takes in what was found; `copy` is the copy bandwidth.
    pub(super) fn fill(&mut self, m: Measured, copy: Option<f64>) {
        (self.bytes, self.flops) = (m.bytes, m.flops);
        self.error = m.error.is_finite().then_some(m.error);
        self.right = m.error <= m.tolerance;
        let Some(Times { us, launches, samples }) = m.times else { return };
        (self.samples, self.launches_a_sample) = (samples, launches);
        let rate = m.bytes as f64 / us.p50 * 1e6;
        self.gb_per_s = Some(rate / 1e9);
        self.of_copy = copy.map(|copy| rate / copy);
        self.tflops = (m.flops > 0).then(|| m.flops as f64 / us.p50 / 1e6);
        self.us = Some(us);
    }

    /// What stands above the lines.
    pub(super) fn header() -> String {
        format!(
            "{:<17} | {:<44} | {:>9} {:>9} {:>9} | {:>11} | {:>7} | {:>6} | {:>7} | {:>8}",
            "op", "shape", "us", "p10", "p90", "bytes", "GB/s", "copy", "TFLOP/s", "error"
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<17} | {:<44} | ", self.op, self.shape)?;
        if let Some(why) = &self.failed {
            return write!(f, "FAILED: {why}");
        }
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        let us = |part: fn(&LatencyMs) -> f64| number(self.us.as_ref().map(part), 2);
        let (p50, p10, p90) = (us(|u| u.p50), us(|u| u.p10), us(|u| u.p90));
        let of_copy = self.of_copy.map_or("-".into(), |x| format!("{:.0} %", x * 100.0));
        let error = self.error.map_or("NaN".into(), |e| format!("{e:.1e}"));
        write!(
            f,
            "{p50:>9} {p10:>9} {p90:>9} | {:>11} | {:>7} | {of_copy:>6} | {:>7} | {error:>8}{}",
            self.bytes,
            number(self.gb_per_s, 0),
            number(self.tflops, 1),
            if self.right { "" } else { "  WRONG" }
        )
    }
}
