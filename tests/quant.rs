//! The second weight set as a whole: what is quantised, and its file through thick and thin.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rksc::model::family::ModelConfig;
use rksc::model::weights::{Tensor, TensorData, WeightStore};
use rksc::quant::{CodeBits, Hessians, LayerInput, Origin, QuantFile, QuantOptions, QuantWeights, Quantiser, ZeroKind};
use rksc::testing::fill::Fill;
use rksc::{DType, Error};

const RTN: QuantOptions = QuantOptions { quantiser: Quantiser::Rtn, group: 32, kv_bits: CodeBits::W8 };
const HQQ: QuantOptions = QuantOptions { quantiser: Quantiser::Hqq, group: 64, kv_bits: CodeBits::W4 };

fn tiny(seed: u64) -> (ModelConfig, WeightStore) {
    let config = ModelConfig::shape("tiny").unwrap();
    let store = WeightStore::random(&config, seed, DType::Bf16).unwrap();
    (config, store)
}

fn f32s(tensor: &Tensor) -> Vec<f32> {
    tensor.cast(DType::F32).bytes().as_chunks().0.iter().map(|&e| f32::from_le_bytes(e)).collect()
}

fn assert_same(a: &QuantWeights, b: &QuantWeights) {
    assert_eq!((a.options(), a.iter().count()), (b.options(), b.iter().count()));
    for (a, b) in a.iter().zip(b.iter()) {
        assert_eq!((&a.name, a.codes(), a.scales()), (&b.name, b.codes(), b.scales()));
        assert_eq!(a.zeros(), b.zeros());
    }
}

/// Beside a model in `dir`, or in its folder `cache`.
fn auto(dir: &Path) -> QuantFile {
    QuantFile::Auto { model_dir: Some(dir.to_owned()), cache_dir: Some(dir.join("cache")) }
}

fn mapped(origin: &Origin) -> bool {
    matches!(origin, Origin::Mapped { .. })
}

#[test]
fn every_projection_is_near_its_weights_and_nothing_else_is_there() {
    let (config, store) = tiny(1);
    for options in [RTN, HQQ, QuantOptions { group: 32, ..HQQ }] {
        let river = QuantWeights::quantise(&config, &store, options, None).unwrap();
        assert_eq!(river.iter().count(), 7 * config.num_layers);
        for tensor in river.iter() {
            tensor.validate().unwrap();
            let kv = tensor.name.contains("k_proj") || tensor.name.contains("v_proj");
            let expected = match (kv, options.quantiser) {
                (true, _) if options.kv_bits == CodeBits::W8 => (CodeBits::W8, ZeroKind::None),
                (_, Quantiser::Hqq) => (CodeBits::W4, ZeroKind::Fractional),
                _ => (CodeBits::W4, ZeroKind::Integer),
            };
            assert_eq!((tensor.bits, tensor.zero_kind), expected, "{}", tensor.name);
            let weights = f32s(&store.get(&tensor.name, &[tensor.out_features, tensor.in_features]).unwrap());
            let step = |at: usize| tensor.scales().get(at / tensor.group);
            for (at, (value, w)) in tensor.dequantise().iter().zip(&weights).enumerate() {
                assert!((value - w).abs() <= step(at), "{}: {value} for {w} at {at}", tensor.name);
            }
        }
        assert!(river.get("model.embed_tokens.weight").is_none());
        assert!(river.get("model.layers.1.mlp.down_proj.weight").is_some());
    }
    let hqq = QuantWeights::quantise(&config, &store, HQQ, None).unwrap();
    assert_eq!(hqq.bits_per_weight(), 4.5);
}

#[test]
fn what_cannot_be_quantised_is_refused_with_the_way_out() {
    let (config, store) = tiny(1);
    let why = |config: &ModelConfig, store: &WeightStore, options| {
        QuantWeights::quantise(config, store, options, None).unwrap_err().to_string()
    };
    let message = why(&config, &store, QuantOptions { group: 128, ..HQQ });
    assert!(message.contains("group") && message.contains("q_proj") && message.contains("use 64"), "{message}");
    assert!(why(&config, &store, QuantOptions { group: 48, ..HQQ }).contains("use 32, 64 or 128"));
    let message = why(&config, &store, QuantOptions { quantiser: Quantiser::Gptq, ..HQQ });
    assert!(message.contains("rksc-run quantise --quantiser gptq --text FILE"), "{message}");

    let dir = tempfile::tempdir().unwrap();
    let name = "model.layers.1.mlp.up_proj.weight";
    save(&config, &store, &dir.path().join("model.safetensors"), |tensor, bytes| {
        if tensor == name {
            bytes[66..68].copy_from_slice(&0x7fc0u16.to_le_bytes());
        }
    });
    let message = why(&config, &WeightStore::open(dir.path()).unwrap(), HQQ);
    assert!(message.contains(name) && message.contains("element 33"), "{message}");
}

/// Writes a store's tensors as a model file, `change`d.
fn save(config: &ModelConfig, store: &WeightStore, path: &Path, change: impl Fn(&str, &mut Vec<u8>)) {
    let tensors = config.tensor_shapes().into_iter().map(|(name, shape)| {
        let mut bytes = store.get(&name, &shape).unwrap().bytes().to_vec();
        change(&name, &mut bytes);
        (name, shape, bytes)
    });
    let tensors: Vec<_> = tensors.collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn a_file_comes_back_bit_for_bit_and_in_place() {
    let (config, store) = tiny(2);
    let dir = tempfile::tempdir().unwrap();
    for options in [RTN, HQQ] {
        let load = || QuantWeights::load_or_quantise(&config, &store, options, &auto(dir.path()), None).unwrap();
        let (made, origin) = load();
        let file = dir.path().join(format!("rksc-{options}.codes"));
        assert!(matches!(&origin, Origin::Quantised { file: Some(f), .. } if *f == file), "{origin:?}");
        let (again, origin) = load();
        assert!(mapped(&origin), "{origin:?}");
        assert_same(&made, &again);
        for tensor in again.iter() {
            assert!(
                matches!(tensor.codes, TensorData::Mapped { .. }) && matches!(tensor.scales, TensorData::Mapped { .. })
            );
        }
        assert_same(&made, &QuantWeights::read(&file, &config, &store, options).unwrap());
        let bytes = std::fs::read(&file).unwrap();
        made.write(&file, &config, &store).unwrap();
        assert!(bytes == std::fs::read(&file).unwrap(), "two files of one set differ");
    }
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names.contains(&"rksc-rtn-g32-kv8.codes".into()), "{names:?}");
}

#[test]
fn another_models_file_is_replaced_unless_it_was_named() {
    let ((config, store), (_, other)) = (tiny(3), tiny(4));
    let dir = tempfile::tempdir().unwrap();
    let load = |store, file: &QuantFile| QuantWeights::load_or_quantise(&config, store, HQQ, file, None);
    let (_, origin) = load(&store, &auto(dir.path())).unwrap();
    let Origin::Quantised { file: Some(file), .. } = origin else { panic!("{origin}") };

    let message = load(&other, &QuantFile::At(file.clone())).unwrap_err().to_string();
    assert!(message.contains("field model") && message.contains(&file.display().to_string()), "{message}");
    let message =
        QuantWeights::read(&file, &config, &store, QuantOptions { group: 32, ..HQQ }).unwrap_err().to_string();
    assert!(message.contains("field group"), "{message}");
    assert!(mapped(&load(&store, &auto(dir.path())).unwrap().1));

    let (of_other, origin) = load(&other, &auto(dir.path())).unwrap();
    assert!(!mapped(&origin));
    let (again, origin) = load(&other, &auto(dir.path())).unwrap();
    assert!(mapped(&origin));
    assert_same(&of_other, &again);
}

#[test]
fn a_folder_that_cannot_be_written_leaves_the_cache_and_no_folder_leaves_nothing() {
    let (config, store) = tiny(5);
    let dir = tempfile::tempdir().unwrap();
    // Below a file no folder can be, whoever one is.
    let blocked = dir.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let load = |model_dir: PathBuf, cache_dir: Option<PathBuf>| {
        let file = QuantFile::Auto { model_dir: Some(model_dir), cache_dir };
        QuantWeights::load_or_quantise(&config, &store, HQQ, &file, None).unwrap().1
    };
    let cache = dir.path().join("a/b");
    let origin = load(blocked.join("model"), Some(cache.clone()));
    let Origin::Quantised { file: Some(file), .. } = &origin else { panic!("{origin}") };
    let name = format!("rksc-{}-hqq-g64.codes", &store.fingerprint(&config)[..16]);
    assert_eq!(*file, cache.join(name));
    assert!(mapped(&load(blocked.join("model"), Some(cache))));
    for cache in [None, Some(blocked.join("cache"))] {
        assert!(matches!(load(blocked.join("model"), cache), Origin::Quantised { file: None, .. }));
    }
    let named = QuantFile::At(blocked.join("river.codes"));
    let e = QuantWeights::load_or_quantise(&config, &store, HQQ, &named, None).unwrap_err();
    assert!(matches!(e, Error::Io { .. }), "{e}");
    let (_, origin) = QuantWeights::load_or_quantise(&config, &store, HQQ, &QuantFile::None, None).unwrap();
    assert!(matches!(origin, Origin::Quantised { file: None, took } if took > Duration::ZERO));
}

/// Sums of activations whose neighbours go together.
fn hessians(config: &ModelConfig) -> Hessians {
    let (mut fill, mut hessians) = (Fill::new(12), Hessians::new());
    for (layer, input) in (0..config.num_layers).flat_map(|layer| LayerInput::ALL.map(|input| (layer, input))) {
        let width = input.width(config);
        let mut rows = fill.normals(256 * width, 1.0);
        rows.chunks_mut(width).for_each(|row| (1..width).for_each(|i| row[i] += 0.9 * row[i - 1]));
        hessians.add_rows(layer, input, &rows, width).unwrap();
    }
    hessians
}

#[test]
fn activations_are_needed_once() {
    let (config, store) = tiny(9);
    let dir = tempfile::tempdir().unwrap();
    let options = QuantOptions { quantiser: Quantiser::Gptq, kv_bits: CodeBits::W8, ..HQQ };
    let all = hessians(&config);
    let load = |hessians| QuantWeights::load_or_quantise(&config, &store, options, &auto(dir.path()), hessians);
    assert!(matches!(load(None).unwrap_err(), Error::Config { .. }));
    let mut partial = Hessians::new();
    partial.add_rows(0, LayerInput::Qkv, &[1.0; 64], 64).unwrap();
    assert!(load(Some(&partial)).unwrap_err().to_string().contains("O input of layer 0"));
    let (made, origin) = load(Some(&all)).unwrap();
    assert!(!mapped(&origin));
    let (again, origin) = load(None).unwrap();
    assert!(mapped(&origin));
    assert_same(&made, &again);
    let rtn =
        QuantWeights::quantise(&config, &store, QuantOptions { quantiser: Quantiser::Rtn, ..options }, None).unwrap();
    for (gptq, rtn) in made.iter().zip(rtn.iter()) {
        assert_eq!(gptq.codes() == rtn.codes(), gptq.bits == CodeBits::W8, "{}", gptq.name);
    }
}

#[test]
fn the_summary_has_a_row_per_kind() {
    let (config, store) = tiny(10);
    let summary = QuantWeights::quantise(&config, &store, RTN, None).unwrap().summary(&store).unwrap();
    let kinds: Vec<_> = summary.iter().map(|row| row.kind.as_str()).collect();
    assert_eq!(kinds, ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]);
    for row in summary {
        let (bits, error) =
            if ["k_proj", "v_proj"].contains(&&*row.kind) { (8.5, 0.003..0.01) } else { (4.75, 0.06..0.12) };
        assert_eq!(row.bits_per_weight, bits);
        assert!(error.contains(&row.relative_error), "{row:?}");
        assert_eq!(row.num_matrices, 2);
    }
}

/// A written file, and what reading it again says with `change`.
fn reread(options: QuantOptions, mut change: impl FnMut(&[u8], &dyn Fn(&[u8]) -> rksc::Result<QuantWeights>)) {
    let (config, store) = tiny(6);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("river.codes");
    let made = QuantWeights::quantise(&config, &store, options, None).unwrap();
    made.write(&file, &config, &store).unwrap();
    let whole = std::fs::read(&file).unwrap();
    change(&whole, &|bytes| {
        // A new file each time: what is mapped must not change.
        let changed = dir.path().join("changed.codes");
        let _ = std::fs::remove_file(&changed);
        std::fs::write(&changed, bytes).unwrap();
        let read = QuantWeights::read(&changed, &config, &store, options);
        if let Ok(read) = &read {
            assert_same(&made, read);
        }
        read
    });
}

#[test]
fn a_flipped_bit_is_found_or_changes_nothing() {
    reread(RTN, |whole, read| {
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        let mut fill = Fill::new(1);
        let in_header = (0..8).chain((8..header).step_by(7));
        let in_data = (0..150).map(|_| header + fill.below(whole.len() - header)).chain([whole.len() - 1]);
        for at in in_header.chain(in_data) {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1 << (at % 8);
            match read(&bytes) {
                // A space may become another blank.
                Ok(_) => assert!(at < header && whole[at] == b' ', "byte {at} of {header}"),
                Err(e) => {
                    let (e, named) = (e.to_string(), e.to_string().contains("changed.codes"));
                    assert!(named && (e.contains("delete") || e.contains("make the file anew")), "byte {at}: {e}");
                }
            }
        }
    });
}

#[test]
fn a_file_cut_short_or_grown_is_refused() {
    reread(HQQ, |whole, read| {
        let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
        for len in [0, 1, 7, 8, 9, header - 1, header, header + 1, whole.len() / 2, whole.len() - 1] {
            let e = read(&whole[..len]).unwrap_err().to_string();
            assert!(e.contains("changed.codes") && e.contains("delete the file"), "{len} bytes: {e}");
        }
        let e = read(&[whole, b"x"].concat()).unwrap_err().to_string();
        assert!(e.contains("delete the file"), "{e}");
        assert!(read(b"version https://git-lfs.github.com/spec/v1").is_err());
    });
}

#[test]
fn tensors_off_their_boundaries_are_copied() {
    reread(HQQ, |whole, read| {
        let len = u64::from_le_bytes(whole[..8].try_into().unwrap());
        let (header, data) = whole[8..].split_at(len as usize);
        let shifted = [&(len + 1).to_le_bytes()[..], header, b" ", data].concat();
        for tensor in read(&shifted).unwrap().iter() {
            assert!(matches!((&tensor.codes, &tensor.scales), (TensorData::Owned(_), TensorData::Owned(_))));
        }
    });
}

#[test]
fn a_damaged_file_is_an_error_wherever_it_lies() {
    let (config, store) = tiny(7);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rksc-hqq-g64.codes");
    std::fs::write(&file, [0xff; 100]).unwrap();
    for file in [auto(dir.path()), QuantFile::At(file)] {
        let e = QuantWeights::load_or_quantise(&config, &store, HQQ, &file, None).unwrap_err();
        assert!(matches!(e, Error::Format { .. }) && e.to_string().contains("it is made anew"), "{e}");
    }
}

#[test]
fn writers_at_the_same_time_leave_a_whole_file() {
    let (config, store) = tiny(8);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("river.codes");
    let made = QuantWeights::quantise(&config, &store, HQQ, None).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    made.write(&file, &config, &store).unwrap();
                    assert_same(&made, &QuantWeights::read(&file, &config, &store, HQQ).unwrap());
                }
            });
        }
    });
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}
