//! `rksc-run bench roof`: what this machine can do at most.

use clap::Args as ClapArgs;
use rksc::DType;
use rksc::backend::cpu::Cpu;
use rksc::backend::cpu::roof::{MemoryRoof, linear_rate};
use rksc::backend::cpu::simd::SimdLevel;

use super::{Table, cpu_model, gb};
use crate::common::print_json;

#[derive(ClapArgs)]
pub(crate) struct Args {
    /// Only this type of the linear op: f32, bf16 or f16 [default: bf16 and f32].
    #[arg(long)]
    dtype: Option<DType>,
    /// CPU threads [default: one per core].
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// One JSON object on stdout instead of tables.
    #[arg(long)]
    json: bool,
}

/// Rows at which `linear` is asked for its rate.
const ROWS: [usize; 2] = [256, 1024];

#[derive(serde::Serialize)]
struct Rate {
    simd: SimdLevel,
    dtype: DType,
    rows: usize,
    gflops: f64,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let device = Cpu::new(args.threads, SimdLevel::detect())?.describe();
    eprintln!("memory: 1 GiB");
    let memory = MemoryRoof::measure(args.threads, SimdLevel::detect());
    let mut rates = Vec::new();
    for simd in SimdLevel::ALL.into_iter().filter(|l| l.is_available()) {
        eprintln!("linear: {simd}");
        let mut cpu = Cpu::new(args.threads, simd)?;
        for &dtype in args.dtype.as_ref().map_or(&[DType::Bf16, DType::F32][..], std::slice::from_ref) {
            for rows in ROWS {
                let gflops = linear_rate(&mut cpu, dtype, rows)? / 1e9;
                rates.push(Rate { simd, dtype, rows, gflops });
            }
        }
    }
    if args.json {
        return print_json(&serde_json::json!({
            "bench": "roof", "cpu": cpu_model(), "device": device,
            "memory_gb_per_s": {"read": gb(memory.read), "copy": gb(memory.copy)}, "linear": rates,
        }));
    }
    say!("{} | {device}", cpu_model());
    say!("memory read  {:6.1} GB/s", gb(memory.read));
    say!("memory copy  {:6.1} GB/s (read and write counted)", gb(memory.copy));
    say!("\nlinear 3584 -> 4608, GFLOP/s");
    let mut table = Table::new(&["simd", "dtype", "256 rows", "1024 rows"]);
    for pair in rates.chunks(ROWS.len()) {
        let mut cells = vec![pair[0].simd.to_string(), pair[0].dtype.to_string()];
        cells.extend(pair.iter().map(|r| format!("{:.0}", r.gflops)));
        table.row(cells);
    }
    table.print()?;
    Ok(())
}
