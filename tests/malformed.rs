//! Damaged and crafted model files: each one a typed error that names the file and the cause, none a panic.

use std::path::Path;
use std::time::{Duration, Instant};

use rksc::model::family::{GenerationConfig, ModelConfig};
use rksc::model::weights::WeightStore;
use rksc::problems::read_problems;
use rksc::prompts::PromptPack;
use rksc::tokenizer::Tokenizer;
use rksc::{Error, Result};

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const PROBLEMS: &str = "problems.jsonl";
const PACK: &str = "prompts.json";

/// One model folder with something wrong in it.
struct Case {
    name: &'static str,
    files: Vec<(&'static str, Vec<u8>)>,
    /// The file that the error must name.
    blamed: &'static str,
    /// What the error must say.
    cause: &'static str,
}

fn case(name: &'static str, file: &'static str, bytes: impl Into<Vec<u8>>, cause: &'static str) -> Case {
    Case { name, files: vec![(file, bytes.into())], blamed: file, cause }
}

/// Loads what the blamed file belongs to.
fn load(dir: &Path, case: &Case) -> Result<()> {
    match case.blamed {
        CONFIG => ModelConfig::from_dir(dir).map(drop),
        PROBLEMS => read_problems(&dir.join(PROBLEMS)).map(drop),
        PACK => PromptPack::from_file(&dir.join(PACK)).map(drop),
        GENERATION => GenerationConfig::from_dir(dir, 768).map(drop),
        TOKENIZER => {
            let tokenizer = Tokenizer::from_file(&dir.join(TOKENIZER))?;
            let ids = tokenizer.encode("any text at all")?;
            tokenizer.decode(&ids).map(drop)
        }
        _ => {
            let store = WeightStore::open(dir)?;
            store.get("a", &[2, 2])?;
            store.check_finite()
        }
    }
}

/// The bundled config with one field replaced (`"null"` leaves it absent).
fn config(field: &str, value: &str) -> Vec<u8> {
    edited("models/tinymath/config.json", |json| {
        json[field] = serde_json::from_str(value).unwrap();
    })
}

fn edited(path: &str, edit: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    serde_json::to_vec(&json).unwrap()
}

fn config_cases() -> Vec<Case> {
    let text = std::fs::read_to_string("models/tinymath/config.json").unwrap();
    let field = |name, field, value, cause| case(name, CONFIG, config(field, value), cause);
    vec![
        case("empty", CONFIG, "", "the file is empty"),
        case("cut short", CONFIG, &text[..text.len() / 2], "cut short"),
        case("byte order mark", CONFIG, format!("\u{feff}{text}"), "byte order mark"),
        case("not utf-8", CONFIG, b"{\"hidden_size\": \"\xff\xfe\"}", "UTF-8"),
        case("git lfs pointer", CONFIG, "version https://git-lfs.github.com/spec/v1\noid x", "git lfs pull"),
        case("nan", CONFIG, text.replace("1e-05", "NaN"), "NaN and Infinity are not JSON"),
        case("infinity", CONFIG, text.replace("10000.0", "-Infinity"), "not JSON"),
        case("number too large", CONFIG, text.replace("1e-05", "1e999"), "number out of range"),
        case("trailing garbage", CONFIG, format!("{text} x"), "trailing characters"),
        case("deep nesting", CONFIG, "[".repeat(100_000), "recursion limit"),
        case("a list", CONFIG, "[]", "a list at the top"),
        case("an empty object", CONFIG, "{}", "architectures: missing"),
        field("unknown architecture", "architectures", r#"["FooForCausalLM"]"#, "supported: LlamaForCausalLM"),
        field("mixture of experts", "architectures", r#"["Qwen3MoeForCausalLM"]"#, "mixture-of-experts"),
        field("two architectures", "architectures", r#"["LlamaForCausalLM","B"]"#, "exactly one"),
        field("architecture no list", "architectures", "7", "list of strings"),
        field("no hidden size", "hidden_size", "null", "hidden_size: missing"),
        field("zero hidden", "hidden_size", "0", "hidden_size: 0"),
        field("negative layers", "num_hidden_layers", "-1", "num_hidden_layers: -1"),
        field("zero layers", "num_hidden_layers", "0", "num_hidden_layers: 0"),
        field("fractional heads", "num_attention_heads", "4.5", "num_attention_heads: 4.5"),
        field("heads as text", "num_attention_heads", "\"4\"", "num_attention_heads: \"4\""),
        field("heads not divisible", "num_key_value_heads", "3", "does not divide num_attention_heads = 4"),
        field("zero kv heads", "num_key_value_heads", "0", "num_key_value_heads: 0"),
        field("odd head_dim", "head_dim", "33", "head_dim: 33 is odd"),
        field("absurd vocabulary", "vocab_size", "2000000000", "vocab_size: 2000000000"),
        field("absurd intermediate", "intermediate_size", "18446744073709551616", "intermediate_size"),
        field("absurd positions", "max_position_embeddings", "1000000001", "max_position_embeddings: 1000000001"),
        field("zero eps", "rms_norm_eps", "0", "rms_norm_eps: 0"),
        field("negative eps", "rms_norm_eps", "-1e-5", "rms_norm_eps: -0.00001"),
        field("theta disagrees", "rope_theta", "5.0", "rope_parameters: rope_theta is 10000 here and 5"),
        field("rope scaling", "rope_scaling", r#"{"rope_type":"spiral"}"#, "rope_type \"spiral\""),
        field(
            "rope scaling without its factor",
            "rope_scaling",
            r#"{"rope_type":"yarn"}"#,
            "rope_scaling.factor: missing",
        ),
        field("rope no object", "rope_parameters", "[1]", "rope_parameters: a list must be an object"),
        field("partial rotary", "partial_rotary_factor", "0.5", "partial_rotary_factor"),
        field("gelu", "hidden_act", "\"gelu\"", "hidden_act \"gelu\""),
        field("tie as text", "tie_word_embeddings", "\"yes\"", "tie_word_embeddings: \"yes\" must be true or false"),
        field("eos out of range", "eos_token_id", "768", "eos_token_id: 768 must be a token id below 768"),
        field("eos list with text", "eos_token_id", r#"[1,"x"]"#, "eos_token_id: \"x\""),
        field("negative bos", "bos_token_id", "-1", "bos_token_id: -1"),
        field("fp8", "dtype", "\"float8_e4m3fn\"", "dtype \"float8_e4m3fn\""),
        field("quantised", "quantization_config", r#"{"quant_method":"gptq"}"#, "quantization_config.bits: missing"),
        field(
            "unknown method",
            "quantization_config",
            r#"{"quant_method":"quip"}"#,
            "quant_method: \"quip\" is not read",
        ),
        field("zero window", "sliding_window", "0", "sliding_window: 0"),
        field("sliding layers", "layer_types", r#"["sliding_attention"]"#, "layer_types"),
        case("generation: bad top_p", GENERATION, r#"{"top_p":1.5}"#, "top_p"),
        case("generation: bad temperature", GENERATION, r#"{"temperature":-1}"#, "temperature"),
        case("generation: bad eos", GENERATION, r#"{"eos_token_id":[99999]}"#, "eos_token_id: 99999"),
        case("generation: zero tokens", GENERATION, r#"{"max_new_tokens":0}"#, "max_new_tokens: 0"),
        case("generation: empty", GENERATION, "", "the file is empty"),
    ]
}

/// A safetensors file of this header and so many bytes of data.
fn st(header: &str, data_len: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend(std::iter::repeat_n(0, data_len));
    file
}

fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

/// A file of one good tensor `a`, F32 `[2, 2]`.
fn good(name: &str) -> Vec<u8> {
    st(&format!("{{{}}}", tensor(name, "F32", "[2,2]", 0, 16)), 16)
}

fn weights_cases() -> Vec<Case> {
    let length = |n: u64, rest: &[u8]| [&n.to_le_bytes(), rest].concat();
    let of = |tensors: &[String], data_len| st(&format!("{{{}}}", tensors.join(",")), data_len);
    let one = |name, dtype, shape, start, end, data_len, cause| {
        case(name, WEIGHTS, of(&[tensor("a", dtype, shape, start, end)], data_len), cause)
    };
    let a = || tensor("a", "F32", "[2,2]", 0, 16);
    let mut cut = good("a");
    cut.truncate(cut.len() - 3);
    let mut nan = good("a");
    let at = nan.len() - 4;
    nan[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    let mut infinite = of(&[tensor("a", "BF16", "[2,2]", 0, 8)], 8);
    let at = infinite.len() - 6;
    infinite[at..at + 2].copy_from_slice(&0x7f80u16.to_le_bytes());
    let many_ones = format!("[{}2,2]", "1,".repeat(10_000));
    vec![
        case("no bytes", WEIGHTS, "", "0 bytes long"),
        case("seven bytes", WEIGHTS, [0; 7], "7 bytes long"),
        case("header of 0", WEIGHTS, length(0, b""), "empty"),
        case("header of 7, none there", WEIGHTS, length(7, b""), "cut short"),
        case("header of 8, blank", WEIGHTS, length(8, b"        "), "header"),
        case("header of 100 MB + 1", WEIGHTS, length(100_000_001, b"{}"), "over 100000000"),
        case("header of 100 MB, not there", WEIGHTS, length(100_000_000, b"{}"), "cut short"),
        case("header of u64::MAX", WEIGHTS, length(u64::MAX, b"{}"), "18446744073709551615"),
        case("header no json", WEIGHTS, st("hello", 0), "not valid JSON"),
        case("header a list", WEIGHTS, st("[]", 0), "expected an object"),
        case("header not utf-8", WEIGHTS, length(4, b"{\"\xff\""), "header"),
        case("header nested", WEIGHTS, st(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "recursion limit"),
        case("git lfs", WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        case("duplicate key", WEIGHTS, of(&[a(), tensor("a", "BF16", "[2,4]", 0, 16)], 16), "twice in the header"),
        case("hole", WEIGHTS, of(&[a(), tensor("b", "F32", "[1]", 20, 24)], 24), "a hole"),
        case("overlap", WEIGHTS, of(&[a(), tensor("b", "F32", "[1]", 12, 16)], 16), "an overlap"),
        case("trailing bytes", WEIGHTS, of(&[a()], 20), "4 bytes follow the last tensor"),
        case("cut short", WEIGHTS, cut, "cut short"),
        case("empty but needed", WEIGHTS, of(&[], 0), "tensor a: missing"),
        one("reversed", "F32", "[2,2]", 16, 0, 16, "reversed"),
        one("starts late", "F32", "[1]", 4, 8, 8, "a hole"),
        one("shape overflow", "F32", "[4294967296,4294967296,4294967296]", 0, 16, 16, "does not fit"),
        one("size overflow", "F32", "[18446744073709551615]", 0, 16, 16, "does not fit"),
        one("offset overflow", "F32", "[2,2]", 0, u64::MAX, 16, "cut short"),
        one("shape too small", "F32", "[2]", 0, 16, 16, "does not fit its 16 bytes"),
        one("shape too large", "F32", "[2,3]", 0, 16, 16, "does not fit its 16 bytes"),
        one("negative shape", "F32", "[-2,-2]", 0, 16, 16, "malformed"),
        one("fractional shape", "F32", "[2.0,2.0]", 0, 16, 16, "malformed"),
        one("shape no list", "F32", "4", 0, 16, 16, "malformed"),
        one("huge dimension", "F32", "[18446744073709551616]", 0, 16, 16, "malformed"),
        one("unknown dtype", "F99", "[2,2]", 0, 16, 16, "dtype \"F99\" is unknown"),
        one("fp8 tensor", "F8_E4M3", "[2,2]", 0, 4, 4, "dtype F8_E4M3 is not supported"),
        one("int64 tensor", "I64", "[2,2]", 0, 32, 32, "dtype I64 is not supported"),
        one("wrong shape", "F32", "[4]", 0, 16, 16, "expected shape [2, 2] from the config, found [4]"),
        one("transposed rank", "BF16", "[2,1,2]", 0, 8, 8, "found [2, 1, 2]"),
        case("rank of 10002", WEIGHTS, of(&[tensor("a", "F32", &many_ones, 0, 16)], 16), "found of rank 10002"),
        case("entry no object", WEIGHTS, st(r#"{"a":7}"#, 0), "tensor a: its header entry is malformed"),
        case(
            "control characters in a name",
            WEIGHTS,
            st(r#"{"a\n\u001b[31m":7}"#, 0),
            r"tensor a\n\u{1b}[31m: its header",
        ),
        case("metadata no map", WEIGHTS, st(r#"{"__metadata__":[1]}"#, 0), "header"),
        case("nan element", WEIGHTS, nan, "tensor a: element 3 is NaN"),
        case("infinite element", WEIGHTS, infinite, "tensor a: element 1 is NaN or infinite"),
    ]
}

fn index_cases() -> Vec<Case> {
    let index = |pairs: &str| format!("{{\"metadata\":{{\"total_size\":16}},\"weight_map\":{{{pairs}}}}}").into_bytes();
    let escape = |name, shard: &str| {
        case(name, INDEX, index(&format!("\"a\":{}", serde_json::to_string(shard).unwrap())), "not a plain file name")
    };
    let sharded = |name, pairs, blamed, cause, shards: Vec<(&'static str, Vec<u8>)>| {
        let files = [vec![(INDEX, index(pairs))], shards].concat();
        Case { name, files, blamed, cause }
    };
    vec![
        case("empty index", INDEX, "", "the file is empty"),
        case("index a list", INDEX, "[7]", "invalid type"),
        case("no weight_map", INDEX, "{}", "weight_map: missing"),
        case("weight_map a list", INDEX, r#"{"weight_map":[]}"#, "expected an object"),
        case("weight_map empty", INDEX, index(""), "weight_map: empty"),
        case("weight_map to numbers", INDEX, index(r#""a":7"#), "expected a string"),
        case(
            "index twice",
            INDEX,
            index(r#""a":"x.safetensors","a":"y.safetensors""#),
            "tensor a: twice in weight_map",
        ),
        case("index with byte order mark", INDEX, "\u{feff}{}", "byte order mark"),
        escape("parent folder", "../model.safetensors"),
        escape("absolute", "/etc/x.safetensors"),
        escape("sub folder", "x/y.safetensors"),
        escape("back slashes", "..\\x.safetensors"),
        escape("dot dot", ".."),
        escape("no name", ""),
        escape("zero byte", "x\0.safetensors"),
        case("not safetensors", INDEX, index(r#""a":"x.bin""#), "not a .safetensors file"),
        case("shard missing", INDEX, index(r#""a":"x.safetensors""#), "shard x.safetensors, which is not there"),
        sharded(
            "shard lacks the tensor",
            r#""a":"x.safetensors","b":"x.safetensors""#,
            INDEX,
            "tensor b: the index promises it in x.safetensors",
            vec![("x.safetensors", good("a"))],
        ),
        sharded(
            "tensor in another shard",
            r#""a":"x.safetensors","b":"x.safetensors","c":"y.safetensors""#,
            INDEX,
            "tensor b: the index promises it in x.safetensors",
            vec![("x.safetensors", good("a")), ("y.safetensors", good("b"))],
        ),
        sharded(
            "tensor in two shards",
            r#""a":"x.safetensors","b":"y.safetensors""#,
            "y.safetensors",
            "tensor a: also in",
            vec![("x.safetensors", good("a")), ("y.safetensors", good("a"))],
        ),
        sharded(
            "damaged shard",
            r#""a":"x.safetensors""#,
            "x.safetensors",
            "cut short",
            vec![("x.safetensors", good("a")[..40].to_vec())],
        ),
    ]
}

fn tokenizer_cases() -> Vec<Case> {
    let edit = |name, cause, edit: &dyn Fn(&mut serde_json::Value)| {
        case(name, TOKENIZER, edited("models/tinymath/tokenizer.json", edit), cause)
    };
    let text = std::fs::read_to_string("models/tinymath/tokenizer.json").unwrap();
    vec![
        case("empty", TOKENIZER, "", "loading failed"),
        case("cut short", TOKENIZER, &text[..text.len() - 40], "loading failed"),
        case("no json", TOKENIZER, "hello", "loading failed"),
        case("not utf-8", TOKENIZER, b"{\"\xff\":1}", "loading failed"),
        case("git lfs", TOKENIZER, "version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        edit("no model", "loading failed", &|json| json["model"] = serde_json::Value::Null),
        edit("no decoder", "decoder: none is not supported", &|json| json["decoder"] = serde_json::Value::Null),
        edit("word piece decoder", "decoder: WordPiece", &|json| {
            json["decoder"] = serde_json::json!({"type":"WordPiece","prefix":"##","cleanup":true});
        }),
        edit("dropout", "dropout: 0.5", &|json| json["model"]["dropout"] = serde_json::json!(0.5)),
        edit("two tokens, one id", "stands for both", &|json| {
            json["model"]["vocab"]["zz-twin"] = serde_json::json!(300)
        }),
        edit("absurd id", "id 4000000000", &|json| json["model"]["vocab"]["zz"] = serde_json::json!(4_000_000_000u32)),
        edit("negative id", "loading failed", &|json| json["model"]["vocab"]["zz"] = serde_json::json!(-1)),
        edit("broken expression", "loading failed", &|json| {
            json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = serde_json::json!("(");
        }),
        // Known to panic inside `tokenizers` 0.23.2.
        edit("merge beyond the vocabulary", "loading failed", &|json| {
            json["model"]["continuing_subword_prefix"] = serde_json::json!("a prefix longer than any token there is");
        }),
        edit("merges without a vocabulary", "loading failed", &|json| {
            json["model"]["vocab"] = serde_json::json!({"a": 0, "b": 1});
            json["model"]["merges"] = serde_json::json!([["a", "b"]]);
        }),
        edit("pieces of length 0", "encoding failed", &|json| {
            json["pre_tokenizer"] = serde_json::json!({"type":"FixedLength","length":0});
        }),
        edit("broken charsmap", "loading failed", &|json| {
            json["normalizer"] = serde_json::json!({"type":"Precompiled","precompiled_charsmap":"AAAA"});
        }),
        edit("strip decoder", "Strip at this place", &|json| {
            json["decoder"] = serde_json::json!({"type":"Strip","content":"a","start":9,"stop":9});
        }),
        edit("strip from the end", "Strip at this place", &|json| {
            let strip = serde_json::json!({"type":"Strip","content":" ","start":0,"stop":3});
            json["decoder"] = serde_json::json!({"type":"Sequence","decoders":[{"type":"Fuse"}, strip]});
        }),
    ]
}

fn problem_cases() -> Vec<Case> {
    let problems = |name, text: &str, cause| case(name, PROBLEMS, text.as_bytes(), cause);
    let pack = |name, field: &'static str, value: serde_json::Value, cause| {
        let bytes = edited("models/tinymath/prompts.json", |json| json[field] = value);
        case(name, PACK, bytes, cause)
    };
    vec![
        problems("no problems", "\n \n", "holds no problems"),
        problems("half a line", "{\"id\":\"a\",\"question\":\"q\"}\n{\"id\":\"b\",\"ques", "line 2"),
        problems("a list", "[\"a\", \"q\"]\n", "line 1"),
        problems("no question", "{\"id\": 1}\n", "line 1: field question is missing"),
        problems("blank question", "{\"id\": 1, \"question\": \" \"}\n", "field question is empty"),
        problems("question of numbers", "{\"id\": 1, \"question\": [1]}\n", "line 1"),
        problems("answer as a list", "{\"question\": \"q\", \"answer\": [1]}\n", "field answer"),
        problems("an id twice", "{\"id\":1,\"question\":\"q\"}\n{\"id\":\"1\",\"question\":\"r\"}\n", "appears twice"),
        problems("NaN", "{\"question\": \"q\", \"answer\": NaN}\n", "line 1"),
        case("problems in UTF-16", PROBLEMS, b"\xff\xfe{\0}\0".as_slice(), "not UTF-8"),
        case("nested to the ceiling", PROBLEMS, "[".repeat(100_000), "line 1: recursion limit"),
        case("pack cut short", PACK, b"{\"name\": \"x\"".as_slice(), "EOF"),
        case("pack without texts", PACK, b"{\"name\": \"x\"}".as_slice(), "missing field `problem`"),
        pack("pack with a field too many", "colour", "red".into(), "unknown field `colour`"),
        pack("problem without its question", "problem", "Solve this.".into(), "field problem: needs {question}"),
        pack("approach without a place", "approach", "Think.".into(), "field approach: needs {approach}"),
        pack("no approaches", "approaches", serde_json::json!([]), "field approaches"),
        pack("approaches of numbers", "approaches", serde_json::json!([1]), "invalid type"),
        pack("no spelling of yes", "yes", serde_json::json!([]), "field yes"),
        pack("pattern without a group", "answer_pattern", "is [0-9]+".into(), "field answer_pattern: needs a group"),
        pack("pattern that is none", "answer_pattern", "([0-9]+".into(), "field answer_pattern"),
        pack("pattern of a gigabyte", "answer_pattern", "((a{1000}){1000}){1000}".into(), "field answer_pattern"),
        pack("empty stop", "stops", serde_json::json!([""]), "field stops"),
    ]
}

#[test]
fn every_malformed_file_is_a_typed_error() {
    let cases: Vec<Case> = [config_cases(), weights_cases(), index_cases(), tokenizer_cases(), problem_cases()]
        .into_iter()
        .flatten()
        .collect();
    assert!(cases.len() >= 150, "only {} cases", cases.len());
    let mut slowest = (Duration::ZERO, "");
    let mut failures = Vec::new();
    for case in &cases {
        let dir = tempfile::tempdir().unwrap();
        for (file, bytes) in &case.files {
            std::fs::write(dir.path().join(file), bytes).unwrap();
        }
        let start = Instant::now();
        let result = std::panic::catch_unwind(|| load(dir.path(), case));
        let took = start.elapsed();
        slowest = slowest.max((took, case.name));
        let problem = match result {
            Err(_) => Some("panicked".to_owned()),
            Ok(Ok(())) => Some("was accepted".to_owned()),
            Ok(Err(e)) => {
                let typed = matches!(e, Error::Format { .. } | Error::Weights { .. } | Error::Unsupported { .. });
                let text = e.to_string();
                let named = text.contains(case.blamed) && text.contains(case.cause) && !text.contains('\n');
                (!typed || !named).then(|| format!("gave {e:?}: {text}"))
            }
        };
        if let Some(problem) = problem {
            failures.push(format!("{} ({}, wants {:?}) {problem}", case.name, case.blamed, case.cause));
        }
    }
    println!("{} malformed cases, slowest {:?} ({})", cases.len(), slowest.0, slowest.1);
    assert!(failures.is_empty(), "{} of {}:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

#[test]
fn absent_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let gone = dir.path().join("gone");
    for (result, name) in [
        (ModelConfig::from_dir(&gone).map(drop), "config.json"),
        (Tokenizer::from_file(&gone.join(TOKENIZER)).map(drop), "tokenizer.json"),
        (WeightStore::open(&gone).map(drop), "gone"),
    ] {
        let e = result.unwrap_err();
        assert!(matches!(e, Error::Io { .. }) && e.to_string().contains(name), "{e}");
    }
    let e = WeightStore::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("neither model.safetensors nor"), "{e}");
    std::fs::create_dir(dir.path().join(WEIGHTS)).unwrap();
    let e = WeightStore::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("model.safetensors: not a regular file"), "{e}");
}

#[test]
fn unusual_but_sound_files_load() {
    let dir = tempfile::tempdir().unwrap();
    let header = |tensors: &[String]| format!("{{{}}}", tensors.join(","));
    // A header of odd length: the data is misaligned and copied once.
    let mut text = header(&[tensor("a", "F32", "[2,2]", 0, 16), tensor("ids", "I64", "[1]", 16, 24)]);
    text += if text.len() % 2 == 0 { " " } else { "" };
    let mut file = st(&text, 24);
    let at = file.len() - 24;
    file[at..at + 4].copy_from_slice(&1.5f32.to_le_bytes());
    std::fs::write(dir.path().join(WEIGHTS), file).unwrap();
    let store = WeightStore::open(dir.path()).unwrap();
    let a = store.get("a", &[2, 2]).unwrap();
    assert_eq!((&a.bytes()[..4], a.bytes().as_ptr().align_offset(4)), (&1.5f32.to_le_bytes()[..], 0));
    assert_eq!((store.num_bytes(), store.contains("ids"), store.names().count()), (16, true, 2));
    store.check_finite().unwrap();

    // Shards, one with a tensor that the index does not name, and one tensor without elements.
    let dir = tempfile::tempdir().unwrap();
    let two = header(&[tensor("b", "BF16", "[0,7]", 0, 0), tensor("extra", "F16", "[2]", 0, 4)]);
    std::fs::write(dir.path().join("x.safetensors"), good("a")).unwrap();
    std::fs::write(dir.path().join("y.safetensors"), st(&two, 4)).unwrap();
    std::fs::write(dir.path().join(INDEX), r#"{"weight_map":{"a":"x.safetensors","b":"y.safetensors"}}"#).unwrap();
    let store = WeightStore::open(dir.path()).unwrap();
    assert_eq!(
        (store.get("b", &[0, 7]).unwrap().bytes().len(), store.contains("extra"), store.files().len()),
        (0, true, 2)
    );
    store.check_finite().unwrap();
}

#[test]
fn bundled_weights_are_mapped_in_place() {
    let config = ModelConfig::from_dir(Path::new("models/tinymath")).unwrap();
    let store = WeightStore::open(Path::new("models/tinymath")).unwrap();
    for (name, shape) in config.tensor_shapes() {
        let tensor = store.get(&name, &shape).unwrap();
        assert!(matches!(tensor.data, rksc::model::weights::TensorData::Mapped { .. }), "{name}");
    }
    assert_eq!(store.names().count(), config.tensor_shapes().len());
    assert_eq!(u128::from(store.num_bytes()), config.num_params() * 2);
    store.check_finite().unwrap();
}

#[test]
fn random_damage_never_panics() {
    let header = [tensor("a", "F32", "[2,2]", 0, 16), tensor("b", "BF16", "[3]", 16, 22)].join(",");
    let weights = st(&format!("{{\"__metadata__\":{{\"format\":\"pt\"}},{header}}}"), 22);
    let config = std::fs::read("models/tinymath/config.json").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as usize % n
    };
    let (mut refused, rounds) = (0, 4000);
    for round in 0..rounds {
        let mut bytes = if round % 2 == 0 { weights.clone() } else { config.clone() };
        for _ in 0..1 + below(3) {
            let at = below(bytes.len());
            match below(4) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes[at] = b"0123456789-\"[]{},:.eE"[below(21)],
                2 => bytes.insert(at, b'0' + below(10) as u8),
                _ => bytes[at] = below(256) as u8,
            }
        }
        let bad = if round % 2 == 0 {
            std::fs::write(dir.path().join(WEIGHTS), &bytes).unwrap();
            WeightStore::open(dir.path()).and_then(|store| store.check_finite()).is_err()
        } else {
            let parsed = ModelConfig::from_bytes(Path::new(CONFIG), &bytes);
            parsed.map(|config| config.rope.inv_freq(config.max_position_embeddings).len()).is_err()
        };
        refused += usize::from(bad);
    }
    assert!(refused > rounds / 4, "only {refused} of {rounds} were refused");
}
