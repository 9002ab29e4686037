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
    eprintln!("memory: 1 GiB");
    let memory = MemoryRoof::measure(args.threads, SimdLevel::detect());
    let mut rates = Vec::new();
    for simd in SimdLevel::ALL.into_iter().filter(|l| l.is_available()) {
        eprintln!("linear: {simd}");
        let mut cpu = Cpu::new(args.threads, simd)?;
        for dtype in [DType::Bf16, DType::F32] {
            for rows in ROWS {
                let gflops = linear_rate(&mut cpu, dtype, rows)? / 1e9;
                rates.push(Rate { simd, dtype, rows, gflops });
            }
        }
    }
    let device = Cpu::new(args.threads, SimdLevel::detect())?.describe();
    if args.json {
        return print_json(&serde_json::json!({
            "bench": "roof", "cpu": cpu_model(), "device": device,
            "memory_gb_per_s": {"read": gb(memory.read), "copy": gb(memory.copy)}, "linear": rates,
        }));
    }
    println!("{} | {device}", cpu_model());
    println!("memory read  {:6.1} GB/s", gb(memory.read));
    println!("memory copy  {:6.1} GB/s (read and write counted)", gb(memory.copy));
    println!("\nlinear 3584 -> 4608, GFLOP/s");
    let mut table = Table::new(&["simd", "dtype", "256 rows", "1024 rows"]);
    for pair in rates.chunks(ROWS.len()) {
        let mut cells = vec![pair[0].simd.to_string(), pair[0].dtype.to_string()];
        cells.extend(pair.iter().map(|r| format!("{:.0}", r.gflops)));
        table.row(cells);
    }
    table.print()?;
    Ok(())
}
