//! The memory table of the README is what `rksc-run plan` says.

mod common;

use std::process::Command;

use common::*;
use rksc::model::family::ModelConfig;
use serde_json::Value;

const HEADER: &str = "| `--shape` |";

fn plan(shape: &str, more: &[&str]) -> Value {
    let args = ["plan", "--shape", shape, "--prefix", "1024", "--own", "512", "--kv-cache-memory", "64GiB", "--json"];
    let out = Command::new(env!("CARGO_BIN_EXE_rksc-run")).args(args).args(more).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

fn row(shape: &str) -> String {
    let (plain, quantised) = (plan(shape, &[]), plan(shape, &["--quantise"]));
    let bytes = |plan: &Value, field: &str| plan[field].as_u64().unwrap();
    let gib = |n: u64| format!("{:.1} GiB", n as f64 / (1u64 << 30) as f64);
    let params = ModelConfig::shape(shape).unwrap().num_params() as f64 / 1e9;
    let per_token = bytes(&plain, "kv_bytes_per_token");
    let per_branch = bytes(&plain, "kv_bytes_per_branch");
    let held = bytes(&plain, "weight_bytes") + bytes(&plain, "workspace_bytes") + 1024 * per_token + 8 * per_branch;
    format!(
        "| `{shape}` | {params:.2} G | {} | {} | {} KiB | {:.0} MiB | {} |",
        gib(bytes(&plain, "weight_bytes")),
        gib(bytes(&quantised, "weight_bytes") + bytes(&quantised, "code_bytes")),
        per_token / 1024,
        per_branch as f64 / (1u64 << 20) as f64,
        gib(held)
    )
}

#[test]
fn the_readmes_table_of_memory_is_what_plan_says() {
    let expected: Vec<String> = ModelConfig::shapes().filter(|&name| name != "tiny").map(row).collect();
    let readme = read(&path("README.md"));
    let table = readme.lines().skip_while(|line| !line.starts_with(HEADER)).skip(2);
    let table: Vec<&str> = table.take_while(|line| line.starts_with('|')).collect();
    assert_eq!(table, expected, "\n{}", expected.join("\n"));
}
