//! A model's codes ahead of time: made anew, from the activations of a text where the quantiser wants them, and written
//! where [`Engine::open`] will look.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use super::open::load;
use super::{Engine, EventKind, PrefillOptions};
use crate::config::{EngineConfig, available_memory};
use crate::error::{Error, Result};
use crate::quant::{Hessians, KindSummary, QuantFile, QuantOptions, QuantWeights, Quantiser};
use crate::tree::{Branch, BranchId, EndReason};

/// What [`Engine::make_codes`] has made.
#[derive(Clone, Debug, serde::Serialize)]
pub struct MadeCodes {
    /// With what.
    pub options: QuantOptions,
    /// Where.
    pub file: PathBuf,
    /// Bytes of codes, scales and zeros.
    pub num_bytes: u64,
    /// Bits that a weight takes, scales and zeros included.
    pub bits_per_weight: f64,
    /// Tokens whose activations were looked at.
    pub num_tokens: usize,
    /// Times the text ran: more than once where the sums of all layers would not have fitted.
    pub num_runs: usize,
    /// Time to make and write them.
    pub seconds: f64,
    /// Cost and loss by kind of matrix.
    pub kinds: Vec<KindSummary>,
}

impl Engine {
    /// Quantises the configuration's model with `options`, whether there is a set already or not, and writes it to
    /// [`EngineConfig::codes_file`]. `texts` are what [`Quantiser::Gptq`] looks at; the others need none.
    pub fn make_codes(config: &EngineConfig, options: QuantOptions, texts: &[Vec<u32>]) -> Result<MadeCodes> {
        let started = Instant::now();
        let config = EngineConfig { quantise: None, river: Some(options), ..config.clone() };
        config.validate()?;
        let file = config.codes_file();
        file.check_replaceable()?;
        if file == QuantFile::None {
            return Err(Error::config("out", "random weights have no folder for their codes; name a file"));
        }
        let (model, store) = load(&config)?;
        let mut weights = QuantWeights::without_layers(&model, options)?;
        let runs = match options.quantiser {
            Quantiser::Gptq if !texts.is_empty() => layers_a_run(model.num_layers, Hessians::layer_bytes(&model)),
            _ => Vec::new(),
        };
        if runs.is_empty() {
            weights.add_layers((&model, &store), 0..model.num_layers, None)?;
        } else {
            let mut engine = Self::with_weights(config, model.clone(), &store)?;
            for layers in runs.clone() {
                let hessians = engine.hessians(texts, layers.clone())?;
                weights.add_layers((&model, &store), layers, Some(&hessians))?;
            }
        }
        let file = weights.put(&model, &store, &file)?;
        Ok(MadeCodes {
            options,
            file,
            num_bytes: weights.num_bytes(),
            bits_per_weight: weights.bits_per_weight(),
            num_tokens: if runs.is_empty() { 0 } else { texts.iter().map(Vec::len).sum() },
            num_runs: runs.len(),
            seconds: started.elapsed().as_secs_f64(),
            kinds: weights.summary(&store)?,
        })
    }

    /// X^T X of what the matrices of `layers` are multiplied with while `texts` run, each as a prompt of its own and
    /// outside the prefix cache. Refused while branches have tokens to run.
    pub fn hessians(&mut self, texts: &[Vec<u32>], layers: Range<usize>) -> Result<Hessians> {
        if self.tree.iter().any(Branch::is_runnable) {
            return Err(Error::config("hessians", "branches have tokens to run, which would count as text; run them"));
        }
        self.runner.begin_capture(layers);
        let ran = texts.iter().try_for_each(|text| self.run_alone(text));
        let hessians = self.runner.end_capture();
        ran.map(|()| hessians)
    }

    /// Runs a prompt that nobody asks anything of.
    fn run_alone(&mut self, text: &[u32]) -> Result<()> {
        let id = self.prefill(text, PrefillOptions { use_prefix_cache: false, ..PrefillOptions::default() })?;
        let ran = self.run_to_end(id, text.len());
        self.events.retain(|event| event.branch != id);
        self.prune(id)?;
        ran
    }

    fn run_to_end(&mut self, id: BranchId, num_tokens: usize) -> Result<()> {
        while self.tree.get(id)?.is_runnable() {
            self.step()?;
        }
        let broke = EventKind::Ended(EndReason::NonFinite);
        if self.events.iter().any(|event| event.branch == id && event.kind == broke) {
            return Err(Error::NonFinite { branch: id.to_string(), position: num_tokens - 1 });
        }
        Ok(())
    }
}

/// Ranges of layers whose sums, of `layer_bytes` a layer, fit a quarter of the free memory.
fn layers_a_run(num_layers: usize, layer_bytes: u64) -> Vec<Range<usize>> {
    let room = available_memory().map_or(u64::MAX, |free| free / 4);
    ranges(num_layers, usize::try_from(room / layer_bytes.max(1)).unwrap_or(usize::MAX))
}

fn ranges(num_layers: usize, at_once: usize) -> Vec<Range<usize>> {
    let at_once = at_once.clamp(1, num_layers.max(1));
    (0..num_layers).step_by(at_once).map(|first| first..(first + at_once).min(num_layers)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::model::family::ModelConfig;
    use crate::model::weights::WeightStore;
    use crate::quant::LayerInput;

    const OPTIONS: QuantOptions =
        QuantOptions { quantiser: Quantiser::Gptq, group: 32, kv_bits: crate::quant::CodeBits::W4 };

    fn engine(model: &ModelConfig, store: &WeightStore, max_batch_tokens: usize) -> Engine {
        let config = EngineConfig {
            dtype: DType::F32,
            device: "cpu".into(),
            threads: 1,
            kv_cache_memory: Some(8 << 20),
            max_batch_tokens,
            ..EngineConfig::default()
        };
        Engine::with_weights(config, model.clone(), store).unwrap()
    }

    fn texts() -> Vec<Vec<u32>> {
        (0..3).map(|t| (0..40 + t).map(|i| (i * 7 + t) % 250 + 2).collect()).collect()
    }

    /// A set does not depend on how many layers are looked at in one run, and the engine is as it was.
    #[test]
    fn layers_may_be_captured_apart() {
        let model = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&model, 3, DType::F32).unwrap();
        let mut e = engine(&model, &store, 2048);
        let whole = e.hessians(&texts(), 0..2).unwrap();
        for input in LayerInput::ALL {
            assert_eq!((whole.num_rows(0, input), whole.num_rows(1, input)), (123, 123));
        }
        let together = QuantWeights::quantise(&model, &store, OPTIONS, Some(&whole)).unwrap();
        let mut apart = QuantWeights::without_layers(&model, OPTIONS).unwrap();
        for layers in ranges(2, 1) {
            let hessians = e.hessians(&texts(), layers.clone()).unwrap();
            assert_eq!(hessians.num_rows(1 - layers.start, LayerInput::O), 0);
            assert_eq!(hessians.num_bytes(), Hessians::layer_bytes(&model));
            apart.add_layers((&model, &store), layers, Some(&hessians)).unwrap();
        }
        assert_eq!(together.iter().count(), apart.iter().count());
        for (a, b) in together.iter().zip(apart.iter()) {
            assert_eq!((&a.name, a.codes(), a.scales(), a.zeros()), (&b.name, b.codes(), b.scales(), b.zeros()));
        }
        assert_eq!((e.engine_stats().branches, e.engine_stats().blocks_used), (0, 0));
        assert!(e.next_event().is_none());
        e.check_integrity().unwrap();
    }

    /// Prompts that run in chunks are looked at whole, and once.
    #[test]
    fn chunks_are_looked_at_once() {
        let model = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&model, 3, DType::F32).unwrap();
        let hessians = engine(&model, &store, 16).hessians(&texts(), 0..2).unwrap();
        LayerInput::ALL.iter().for_each(|&input| assert_eq!(hessians.num_rows(1, input), 123));
    }

    #[test]
    fn a_busy_engine_captures_nothing() {
        let model = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&model, 3, DType::F32).unwrap();
        let mut e = engine(&model, &store, 2048);
        e.prefill(&[1, 2, 3], PrefillOptions::default()).unwrap();
        assert!(e.hessians(&texts(), 0..2).unwrap_err().to_string().starts_with("hessians: "));
    }

    #[test]
    fn every_layer_has_its_run() {
        assert_eq!(ranges(5, 2), [0..2, 2..4, 4..5]);
        assert_eq!(ranges(5, usize::MAX), vec![0..5]);
        assert_eq!(ranges(2, 0), [0..1, 1..2]);
    }

    #[test]
    fn options_know_what_a_set_will_take() {
        let model = ModelConfig::shape("tiny").unwrap();
        let store = WeightStore::random(&model, 3, DType::F32).unwrap();
        for (quantiser, kv_bits) in [(Quantiser::Hqq, "4"), (Quantiser::Rtn, "8")] {
            let options = QuantOptions { quantiser, kv_bits: kv_bits.parse().unwrap(), ..OPTIONS };
            let made = QuantWeights::quantise(&model, &store, options, None).unwrap();
            let (bytes, weights) = options.num_bytes(&model);
            assert_eq!((bytes, 8.0 * bytes as f64 / weights as f64), (made.num_bytes(), made.bits_per_weight()));
        }
    }
}
