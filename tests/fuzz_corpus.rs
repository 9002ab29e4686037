//! The corpus of the fuzz targets (`fuzz/`), through the very functions that they run.

use std::path::Path;

#[allow(dead_code, unreachable_pub)]
#[path = "../fuzz/src/lib.rs"]
mod targets;

#[test]
fn every_input_of_the_corpus_keeps_the_laws() {
    for (name, target) in targets::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let inputs = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut num_inputs = 0;
        for input in inputs {
            let input = input.unwrap().path();
            let caught = std::panic::catch_unwind(|| target(&std::fs::read(&input).unwrap()));
            assert!(caught.is_ok(), "{} breaks a law of {name}", input.display());
            num_inputs += 1;
        }
        println!("{name}: {num_inputs} inputs");
        assert!(num_inputs >= 10, "only {num_inputs} inputs in {}", folder.display());
    }
}
