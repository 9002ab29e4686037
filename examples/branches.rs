//! Branches by hand: load, fork four, step each its own way, read entropy and blocks shared, prune two, verify the rest.
//!
//! `cargo run --release --example branches`

use rksc::engine::{BranchId, GenerateParams, PrefillOptions};
use rksc::sampler::SamplingParams;
use rksc::{Engine, EngineConfig, Result};

fn main() -> Result<()> {
    let config = EngineConfig::default();
    let (source, mut engine) = (config.model.clone(), Engine::open(config)?);
    let tokenizer = source.tokenizer()?;
    let end_tokens = source.end_tokens(engine.model())?;
    let pack = source.prompt_pack(None)?;

    // One prompt, four branches: nothing runs yet, so prompt and suffixes go through the model in one packed pass.
    let question = "Tom has 7 apples. He buys 5 more. Then he gives 3 to Ann. How many apples does Tom have?";
    let root = engine.prefill(&tokenizer.encode(&pack.root("", question))?, PrefillOptions::default())?;
    let mut branches = [BranchId::default(); 4];
    engine.fork(root, &mut branches)?;
    for (i, &branch) in branches.iter().enumerate() {
        engine.append(branch, &tokenizer.encode(&pack.branch(i).unwrap_or_default())?)?;
        let sampling = SamplingParams { temperature: 0.3 * i as f32, seed: 7, ..Default::default() };
        let params = GenerateParams { sampling, end_tokens: end_tokens.clone(), ..Default::default() };
        engine.start(branch, params)?;
    }
    for _ in 0..12 {
        engine.step()?;
    }
    for &branch in &branches {
        let s = engine.stats(branch)?;
        let text = tokenizer.decode(engine.tokens(branch)?)?;
        let tail = text.rsplit("Step 1:").next().unwrap_or("").replace('\n', " / ");
        println!(
            "{branch}: entropy {:.4}, confidence {:.4}, {} blocks shared, {} private |{tail}",
            s.entropy, s.mean_confidence, s.blocks_shared, s.blocks_private
        );
    }

    // The two most confident go on; the others' blocks return at once.
    let mut ranked = branches;
    ranked.sort_by(|a, b| engine.confidence(*b).unwrap_or(0.0).total_cmp(&engine.confidence(*a).unwrap_or(0.0)));
    ranked[2..].iter().try_for_each(|&b| engine.prune(b))?;
    while engine.has_work() {
        engine.step()?;
    }
    let verdicts: Vec<u32> = [&pack.yes[0], &pack.no[0]].iter().filter_map(|s| tokenizer.single_token(s)).collect();
    for &branch in &ranked[..2] {
        engine.append(branch, &tokenizer.encode(&pack.verify_suffix)?)?;
        engine.watch(branch, &verdicts, 0)?;
        engine.step()?;
        let p: Vec<f32> = engine.row(branch)?.map(|r| r.watched.iter().map(|x| x.exp()).collect()).unwrap_or_default();
        println!("{branch}: P(yes) {:.3}, P(no) {:.3}", p[0], p[1]);
    }
    Ok(())
}
