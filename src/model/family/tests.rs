use std::path::Path;

use super::*;
use crate::dtype::DType;

const BASE: &str = r#""architectures":["LlamaForCausalLM"],"hidden_size":192,"intermediate_size":448,"num_hidden_layers":8,
"num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,"vocab_size":768,"max_position_embeddings":2048,"rms_norm_eps":1e-5"#;

fn parse(extra: &str) -> Result<ModelConfig> {
    ModelConfig::from_bytes(Path::new("config.json"), format!("{{{BASE}{extra}}}").as_bytes())
}

fn why(result: Result<ModelConfig>) -> String {
    result.map(|config| format!("accepted: {config:?}")).unwrap_or_else(|e| e.to_string())
}

#[test]
fn bundled_config_parses() {
    let config = ModelConfig::from_dir(Path::new("models/tinymath")).unwrap();
    assert_eq!((config.hidden, config.num_layers, config.head_dim, config.vocab_size), (192, 8, 32, 768));
    assert_eq!(config.num_params(), 2_804_928);
    assert_eq!((config.eos_ids.as_slice(), config.bos_id, config.dtype), (&[1][..], Some(0), DType::Bf16));
    let gen_config = GenerationConfig::from_dir(Path::new("models/tinymath"), config.vocab_size).unwrap();
    assert_eq!((gen_config.max_new_tokens, gen_config.do_sample), (Some(256), false));
    assert_eq!(GenerationConfig::from_dir(Path::new("models"), 1).unwrap(), GenerationConfig::default());
}

#[test]
fn both_rope_spellings_agree() {
    let old = parse(r#","rope_theta":500000,"rope_scaling":null"#).unwrap();
    let new = parse(r#","rope_parameters":{"rope_type":"default","rope_theta":500000.0}"#).unwrap();
    let both = parse(r#","rope_theta":500000,"rope_parameters":{"rope_theta":500000}"#).unwrap();
    assert_eq!((&old, &old), (&new, &both));
    assert_eq!(old.rope, Rope::plain(500_000.0, 32));
    assert_eq!(parse("").unwrap().rope.theta, 10_000.0);
    let odd = why(parse(r#","rope_theta":10000,"rope_parameters":{"rope_theta":20000}"#));
    assert!(odd.contains("20000 here and 10000"), "{odd}");
}

#[test]
fn a_rope_scaling_that_says_too_little_or_something_unknown_is_refused_by_name() {
    for (extra, name) in [
        (r#","rope_scaling":{"type":"linear"}"#, "rope_scaling.factor"),
        (r#","rope_scaling":{"type":"linear","factor":-2.0}"#, "factor"),
        (r#","rope_scaling":{"rope_type":"llama3","factor":8}"#, "low_freq_factor"),
        (
            r#","rope_scaling":{"rope_type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}"#,
            "high_freq_factor",
        ),
        (r#","rope_scaling":{"rope_type":"longrope","short_factor":[1.0],"long_factor":[1.0]}"#, "short_factor"),
        (r#","rope_parameters":{"rope_type":"proportional"}"#, "proportional"),
        (r#","partial_rotary_factor":1.5"#, "partial_rotary_factor"),
    ] {
        let why = why(parse(extra));
        assert!(why.contains(name), "{extra}: {why}");
    }
}

#[test]
fn numbers_that_f32_does_not_hold_are_refused_by_name() {
    let gemma = |name: &str, rest: &str| {
        let family = BASE.replace("LlamaForCausalLM", name);
        why(ModelConfig::from_bytes(Path::new("config.json"), format!("{{{family},{rest}}}").as_bytes()))
    };
    let (two, three) = (|rest| gemma("Gemma2ForCausalLM", rest), |rest| gemma("Gemma3ForCausalLM", rest));
    for (why, name) in [
        (why(parse(r#","rope_scaling":{"type":"linear","factor":1e-300}"#)), "rope_scaling.factor"),
        (
            why(parse(r#","rope_scaling":{"rope_type":"yarn","factor":4,"attention_factor":1e-60}"#)),
            "rope_scaling.attention_factor",
        ),
        (two(r#""attn_logit_softcapping":1e-60"#), "attn_logit_softcapping"),
        (two(r#""query_pre_attn_scalar":1e-100"#), "query_pre_attn_scalar"),
        (
            three(r#""sliding_window":4,"rope_local_base_freq":0"#),
            "rope_local_base_freq: 0 must lie between 1 and 1e12",
        ),
    ] {
        assert!(why.starts_with("config.json: ") && why.contains(name), "{name}: {why}");
    }
    let eps = BASE.replace("1e-5", "1e-61");
    let eps = why(ModelConfig::from_bytes(Path::new("config.json"), format!("{{{eps}}}").as_bytes()));
    assert!(eps.contains("rms_norm_eps: "), "{eps}");
}

#[test]
fn sizes_whose_bytes_cannot_be_counted_are_refused() {
    let large = BASE.replace("192", "1048576").replace("448", "16777216").replace("layers\":8", "layers\":16384");
    let why = why(ModelConfig::from_bytes(Path::new("config.json"), format!("{{{large}}}").as_bytes()));
    assert!(why.contains("at most 17592186044416 are read"), "{why}");
}

#[test]
fn longrope_trained_on_one_token_needs_its_attention_factor() {
    let ones = format!("[{}1]", "1,".repeat(15));
    let longrope = |rest: &str| {
        let family = BASE.replace("LlamaForCausalLM", "Phi3ForCausalLM");
        let scaling = format!(r#"{{"rope_type":"longrope","short_factor":{ones},"long_factor":{ones}{rest}}}"#);
        let text = format!(r#"{{{family},"original_max_position_embeddings":1,"rope_scaling":{scaling}}}"#);
        ModelConfig::from_bytes(Path::new("config.json"), text.as_bytes())
    };
    assert_eq!(longrope(r#","attention_factor":2"#).unwrap().rope.scale(), 2.0);
    let why = why(longrope(""));
    assert!(why.contains("rope_scaling.attention_factor: missing"), "{why}");
}

#[test]
fn a_rule_for_long_contexts_says_how_far_it_reaches() {
    let reach = |extra: &str| parse(extra).map(|c| (c.max_position_embeddings, c.context_limit)).unwrap();
    assert_eq!(reach(""), (2048, 2048));
    assert_eq!(reach(r#","rope_scaling":{"type":"linear","factor":2.0}"#), (2048, 4096));
    assert_eq!(reach(r#","rope_scaling":{"type":"dynamic","factor":4.0}"#), (2048, 8192));
    let yarn = r#","rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":1024}"#;
    assert_eq!(reach(yarn), (2048, 4096));
    let sixteen = vec!["1.5"; 16].join(",");
    let longrope = format!(
        r#","original_max_position_embeddings":512,"rope_scaling":{{"type":"su","short_factor":[{sixteen}],"long_factor":[{sixteen}]}}"#
    );
    assert_eq!(reach(&longrope), (512, 2048));
    let config = parse(&longrope).unwrap();
    assert!((f64::from(config.rope.scale()) - (1.0 + 4f64.ln() / 512f64.ln()).sqrt()).abs() < 1e-6);
}

#[test]
fn inv_freq_matches_the_formula() {
    let config = parse(",\"rope_theta\":10000").unwrap();
    let freq = config.rope.inv_freq(2048);
    assert_eq!((freq.len(), freq[0]), (16, 1.0));
    assert_eq!(freq[8], 0.01);
    assert!((freq[15] - 1.778_279_4e-4).abs() < 1e-10);
}

#[test]
fn families_differ_as_data() {
    let of = |architecture: &str, extra: &str| {
        let text = format!("{{{BASE}{extra}}}").replace("LlamaForCausalLM", architecture);
        ModelConfig::from_bytes(Path::new("config.json"), text.as_bytes())
    };
    let has = |config: &ModelConfig, name: &str| config.tensor_shapes().iter().any(|(n, _)| n.ends_with(name));
    let qwen2 = of("Qwen2ForCausalLM", r#","use_sliding_window":false,"sliding_window":128"#).unwrap();
    assert!(has(&qwen2, "k_proj.bias") && !has(&qwen2, "o_proj.bias") && !qwen2.has_windows());
    let used =
        of("Qwen2ForCausalLM", r#","use_sliding_window":true,"sliding_window":128,"max_window_layers":6"#).unwrap();
    assert_eq!((0..8).map(|l| used.window(l)).collect::<Vec<_>>(), [[None; 6].as_slice(), &[Some(128); 2]].concat());
    let qwen3 = of("Qwen3ForCausalLM", "").unwrap();
    assert!(has(&qwen3, "q_norm.weight") && !has(&qwen3, "q_proj.bias"));
    let mistral = of("MistralForCausalLM", r#","sliding_window":512"#).unwrap();
    assert_eq!((mistral.window(7), mistral.max_position_embeddings), (Some(512), 2048));
    assert!(!of("MistralForCausalLM", r#","sliding_window":null"#).unwrap().has_windows());
    // Without the field transformers takes 4,096, which this context does not reach.
    assert!(!of("MistralForCausalLM", "").unwrap().has_windows());
    let gemma = of("Gemma2ForCausalLM", r#","attn_logit_softcapping":null,"sliding_window":64"#).unwrap();
    assert_eq!((gemma.attn_softcap, gemma.logit_softcap, gemma.tie_word_embeddings), (None, Some(30.0), true));
    assert_eq!((gemma.window(0), gemma.window(1), gemma.activation), (Some(64), None, Activation::GeluTanh));
    let olmo = of("Olmo2ForCausalLM", "").unwrap();
    assert!(has(&olmo, "post_feedforward_layernorm.weight") && !has(&olmo, "0.input_layernorm.weight"));
    assert_eq!(olmo.qk_norm_lens(), Some((128, 64)));
    let llama = of("LlamaForCausalLM", r#","attention_bias":true,"mlp_bias":true"#).unwrap();
    assert!(has(&llama, "o_proj.bias") && has(&llama, "down_proj.bias"));
    let quantised =
        why(of("Phi3ForCausalLM", r#","quantization_config":{"quant_method":"gptq","bits":4,"group_size":128}"#));
    assert!(quantised.contains("quantization_config") && quantised.contains("fused"), "{quantised}");
    let mixtral = why(of("MixtralForCausalLM", ""));
    assert!(mixtral.contains("mixture-of-experts") && mixtral.contains("LlamaForCausalLM"), "{mixtral}");
    assert!(!mixtral.contains('\n'));
}

#[test]
fn named_shapes_have_the_known_sizes() {
    for (name, params) in [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3-8b", 8_030_261_248),
        ("falcon3-7b", 7_455_550_464),
        ("falcon3-10b", 10_305_653_760),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("olmo-2-7b", 7_298_617_344),
    ] {
        assert_eq!(ModelConfig::shape(name).unwrap().num_params(), params, "{name}");
    }
    for name in ModelConfig::shapes() {
        let config = ModelConfig::shape(name).unwrap();
        assert!(
            config.num_q_heads.is_multiple_of(config.num_kv_heads)
                && config.eos_ids.iter().all(|&id| (id as usize) < config.vocab_size)
        );
    }
    assert!(ModelConfig::shape("gpt-5").unwrap_err().to_string().contains("llama-3-8b"));
}

#[test]
fn eos_may_be_a_list_and_dtype_has_two_names() {
    let config = parse(r#","eos_token_id":[1,4],"bos_token_id":null,"torch_dtype":"torch.float16""#).unwrap();
    assert_eq!((config.eos_ids, config.bos_id, config.dtype), (vec![1, 4], None, DType::F16));
    assert_eq!(parse("").unwrap().dtype, DType::F32);
}
