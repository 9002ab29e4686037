#![no_main]

libfuzzer_sys::fuzz_target!(init: rksc_fuzz::let_panics_be_caught(), |data: &[u8]| rksc_fuzz::jsonl(data));
