//! `rksc-run bench kernels`: every op of `include/rksc_kernels.h` on a device, checked and timed.
//!
//! The copy bandwidth is measured first; then each case is checked against its oracle on fresh data and timed inside a
//! graph. What is read from memory in a step of a model (weights, KV) rotates through more memory than any L2 holds;
//! activations stay where the op before them left them. See `harness.rs` for how time is taken.

mod attention;
mod branches;
mod harness;
mod matrices;
mod report;
mod rows;

use std::fs::File;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args as ClapArgs;
use rksc::backend::cuda::bindings::rksc_gather_rows_params;
use rksc::backend::cuda::device::Device;
use rksc::config::DeviceChoice;

use self::harness::Bench;
use self::report::{Report, Sink};
use super::gb;
use crate::common::print_json;

/// Every CUDA op at the shapes of Qwen2.5-7B and Llama-3-8B: error against the oracle, time, bandwidth.
///
/// Columns: median, p10 and p90 of at least 30 samples in microseconds, device time by events around graphs of many
/// launches; the least bytes the op can move, each input read once and each output written once; those bytes a second,
/// alone and as a share of the copy bandwidth measured in the same run (bytes read plus bytes written); arithmetic where
/// it can matter; and the norm of the error over the norm of a float64 oracle.
#[derive(ClapArgs)]
pub(crate) struct Args {
    /// cuda:N; or emulated, where the build has it: one tiny shape an op, whose times mean nothing and are not shown.
    #[arg(long, default_value = "cuda:0")]
    device: String,
    /// Only this op.
    #[arg(long, value_name = "NAME")]
    op: Option<String>,
    /// One tiny shape an op, checked but not timed, as on the emulated device: what a sanitizer can run.
    #[arg(long)]
    tiny: bool,
    /// One JSON object on stdout instead of a table. The environment's RKSC_COMMIT names the commit in it.
    #[arg(long)]
    json: bool,
    /// The same line by line: what was measured on, then one line a case as soon as it is done.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Launches an op that reads far outside of its buffer, so that a sanitizer can be seen to report it.
    #[arg(long, hide = true)]
    planted_fault: bool,
}

type Op = (&'static str, fn(&mut Bench) -> anyhow::Result<()>);

const OPS: [Op; 22] = [
    ("embed", rows::embed),
    ("add_rms_norm", rows::add_rms_norm),
    ("exit_rows", rows::exit_rows),
    ("linear", matrices::linear),
    ("linear_w4", matrices::linear_w4),
    ("linear_w8", matrices::linear_w8),
    ("linear_cublas", matrices::linear_cublas),
    ("rope_append", rows::rope_append),
    ("kv_copy_blocks", rows::kv_copy_blocks),
    ("kv_transfer", rows::kv_transfer),
    ("paged_attention", attention::paged_attention),
    ("attention_mass", attention::attention_mass),
    ("glu", rows::glu),
    ("gather_rows", rows::gather_rows),
    ("softcap", rows::softcap),
    ("gather_columns", rows::gather_columns),
    ("row_stats", rows::row_stats),
    ("sample", rows::sample),
    ("entropy_probe", matrices::entropy_probe),
    ("branch_similarity", branches::branch_similarity),
    ("kv_scores", branches::kv_scores),
    ("kv_compact", branches::kv_compact),
];

/// Where and of what a run is: the head of its report.
#[derive(serde::Serialize)]
struct Head {
    bench: &'static str,
    device: String,
    driver: Option<String>,
    num_sms: u32,
    commit: String,
    date: String,
    timed: bool,
    copy_gb_s: Option<f64>,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let ops: Vec<Op> = OPS.into_iter().filter(|(name, _)| args.op.as_deref().is_none_or(|op| op == *name)).collect();
    let names = OPS.map(|(name, _)| name).join(", ");
    anyhow::ensure!(!ops.is_empty(), "--op: unknown; use {names}");
    let mut device = open(&args.device)?;
    if args.planted_fault {
        return planted_fault(&mut device);
    }
    let out = args.out.as_deref().map(|p| File::create(p).with_context(|| p.display().to_string())).transpose()?;
    let timed = !args.tiny && !device.is_emulated();
    let info = device.info().clone();
    let mut bench = Bench::new(device, timed, Sink { out, table: !args.json });
    let head = Head {
        bench: "kernels",
        device: format!("{} ({})", info.name, info.device),
        driver: info.driver,
        num_sms: info.num_sms,
        commit: std::env::var("RKSC_COMMIT").unwrap_or_else(|_| "unknown".into()),
        date: date(SystemTime::now()),
        timed,
        copy_gb_s: bench.measure_copy()?.map(gb),
    };
    bench.sink.line(&head)?;
    if !args.json {
        match head.copy_gb_s {
            Some(copy) => say!("{} | copy {copy:.0} GB/s, read and write counted", head.device),
            None => say!("{} | one tiny shape an op; no times", head.device),
        }
        say!("{}", Report::header());
    }
    ops.iter().try_for_each(|(_, op)| op(&mut bench))?;
    let cases = bench.reports;
    let wrong = cases.iter().filter(|case| !case.right).count();
    if args.json {
        let mut all = serde_json::to_value(&head)?;
        all["cases"] = serde_json::to_value(&cases)?;
        print_json(&all)?;
    }
    anyhow::ensure!(wrong == 0, "{wrong} of {} cases failed or are wrong", cases.len());
    Ok(())
}

/// The device of a name.
fn open(name: &str) -> anyhow::Result<Device> {
    match name.parse()? {
        DeviceChoice::Cuda(ordinal) => Ok(Device::gpu(ordinal)?),
        DeviceChoice::Emulated => Ok(Device::emulated()?),
        _ => anyhow::bail!("--device: {name} has no CUDA kernels; use cuda:N"),
    }
}

/// Bytes a second that a GPU copies, read and write counted.
pub(super) fn copy_rate(device: &str) -> anyhow::Result<f64> {
    let copied = silent(device)?.measure_copy()?;
    copied.ok_or_else(|| anyhow::anyhow!("--device: {device} is no GPU"))
}

/// Operations a second of a GPU's large matrix products.
pub(super) fn product_rate(device: &str) -> anyhow::Result<f64> {
    matrices::product_rate(&mut silent(device)?)
}

fn silent(device: &str) -> anyhow::Result<Bench> {
    let device = open(device)?;
    let timed = !device.is_emulated();
    Ok(Bench::new(device, timed, Sink { out: None, table: false }))
}

/// Row 2^20 of a source of one row.
fn planted_fault(device: &mut Device) -> anyhow::Result<()> {
    const WIDTH: usize = 64;
    let (rows, src) = (device.buffer(&[1u32 << 20])?, device.buffer(&[1.0f32; WIDTH])?);
    let mut dst = device.zeroed::<f32>(WIDTH)?;
    let params = rksc_gather_rows_params {
        rows: rows.ptr(),
        src: src.ptr(),
        dst: dst.ptr_mut(),
        num_rows: 1,
        width: WIDTH as u32,
    };
    device.launch(device.kernels().gather_rows, &params)?;
    device.synchronize()?;
    say!("a read outside of its buffer went unnoticed");
    Ok(())
}

/// `2026-05-17`, in UTC.
fn date(now: SystemTime) -> String {
    let days = now.duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs() / 86_400);
    let is_leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let (mut year, mut left) = (1970, days);
    while left >= 365 + u64::from(is_leap(year)) {
        left -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let months = [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while left >= months[month] {
        left -= months[month];
        month += 1;
    }
    format!("{year}-{:02}-{:02}", month + 1, left + 1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates() {
        let after = |days: u64| date(UNIX_EPOCH + Duration::from_secs(days * 86_400 + 86_399));
        assert_eq!(
            [after(0), after(59), after(11_016), after(20_512)],
            ["1970-01-01", "1970-03-01", "2000-02-29", "2026-02-28"]
        );
    }
}
