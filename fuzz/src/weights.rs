//! A safetensors file, behind a first line that is empty or the config.json of its model.

use std::path::Path;

use rksc::DType;
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::quant::QuantWeights;
use serde_json::Value;

/// Larger models are not looked for in a file of this size.
const MAX_LAYERS: usize = 64;

/// See the module text.
pub fn weights(data: &[u8]) {
    let (line, file) = super::split_once(data, b'\n');
    let Ok(mut store) = WeightStore::from_bytes(Path::new("model.safetensors"), file) else { return };
    check_tensors(&store, file);
    let _ = store.check_finite();
    match ModelConfig::from_bytes(Path::new("config.json"), line) {
        Ok(model) if model.num_layers <= MAX_LAYERS => load(&model, &mut store),
        _ => {}
    }
}

/// The store has what another reader of the header finds: names, shapes and bytes.
fn check_tensors(store: &WeightStore, file: &[u8]) {
    let (length, rest) = file.split_first_chunk().expect("a store was read from it");
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: Value = serde_json::from_slice(header).expect("a store was read from it");
    let mut entries = header.as_object().expect("an object").clone();
    entries.remove("__metadata__");
    assert_eq!(store.names().count(), entries.len());
    let mut num_bytes = 0;
    for (name, entry) in &entries {
        let number = |value: &Value| value.as_u64().expect("checked") as usize;
        let shape: Vec<usize> = entry["shape"].as_array().expect("checked").iter().map(number).collect();
        let tensor = store.get(name, &shape);
        if !matches!(entry["dtype"].as_str(), Some("F32" | "BF16" | "F16")) {
            assert!(tensor.is_err(), "{name} is no tensor to compute with");
            continue;
        }
        let tensor = tensor.expect("its own shape");
        assert_eq!(tensor.bytes(), &data[number(&entry["data_offsets"][0])..number(&entry["data_offsets"][1])]);
        num_bytes += tensor.bytes().len() as u64;
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            assert_eq!(tensor.cast(dtype).num_elems(), tensor.num_elems());
        }
        assert!(store.get(name, &[shape.as_slice(), &[1]].concat()).is_err(), "{name} has another rank");
    }
    assert_eq!(store.num_bytes(), num_bytes);
}

/// All that opening the model asks the store for.
fn load(model: &ModelConfig, store: &mut WeightStore) {
    if store.split_fused(model).is_err() {
        return;
    }
    for (name, shape) in model.tensor_shapes() {
        if let Ok(tensor) = store.get(&name, &shape) {
            assert_eq!(tensor.num_elems(), shape.iter().product::<usize>());
        }
    }
    if let Ok(Some(codes)) = QuantWeights::from_checkpoint(model, store) {
        assert!(codes.iter().count() > 0 && codes.num_bytes() > 0);
    }
}
