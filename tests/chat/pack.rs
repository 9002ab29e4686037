//! The built-in pack, said through the templates of two families to models of random weights: what is shared, what is
//! appended, what is asked.

use std::path::Path;
use std::sync::Arc;

use rksc::chat::{ChatTemplate, Message, RenderOptions};
use rksc::config::{EngineConfig, ModelSource};
use rksc::dtype::DType;
use rksc::engine::{Engine, PrefillOptions};
use rksc::model::family::ModelConfig;
use rksc::model::weights::WeightStore;
use rksc::problems::parse_problems;
use rksc::prompts::PromptPack;
use rksc::solver::task::{CompiledPack, Task, TextTask};
use rksc::solver::{Policy, SolverConfig, VerifyMode};
use rksc::tokenizer::Tokenizer;

use super::common::{self, path};

fn pack() -> PromptPack {
    PromptPack::from_file(&path("models/chat-pack/prompts.json")).unwrap()
}

pub(super) struct Family {
    pub(super) template: ChatTemplate,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) model: ModelConfig,
}

pub(super) fn family(name: &str) -> Family {
    let golden = super::json(&format!("goldens/{name}.json"));
    let source = common::read(&path(&format!("tests/chat/templates/{name}.jinja")));
    let template =
        ChatTemplate::from_source(Path::new(name), &source, golden["special"].as_object().unwrap().clone()).unwrap();
    let tokenizer = Arc::new(super::tokenizer(golden["tokenizer"].as_str().unwrap()));
    let kind =
        if golden["tokenizer"] == "qwen" { ["Qwen2ForCausalLM", "qwen2"] } else { ["LlamaForCausalLM", "llama"] };
    let config = serde_json::json!({
        "architectures": [kind[0]], "model_type": kind[1], "vocab_size": tokenizer.vocab_size(), "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 2048,
        "tie_word_embeddings": true, "eos_token_id": 0,
    });
    let model = ModelConfig::from_bytes(Path::new("config.json"), config.to_string().as_bytes()).unwrap();
    Family { template, tokenizer, model }
}

pub(super) fn random_engine(model: ModelConfig) -> Engine {
    let config = EngineConfig {
        model: ModelSource::Random { shape: "tiny".into(), seed: 1 },
        dtype: DType::F32,
        threads: 1,
        kv_cache_memory: Some(32 << 20),
        ..EngineConfig::default()
    };
    let store = WeightStore::random(&model, 7, DType::F32).unwrap();
    Engine::with_weights(config, model, &store).unwrap()
}

const QUESTION: &str = "A baker sells 24 rolls and then 18 rolls. How many rolls does she sell in all?";

impl Family {
    fn compiled(&self, pack: PromptPack) -> rksc::Result<Arc<CompiledPack>> {
        CompiledPack::with_template(pack, &self.template, self.tokenizer.clone(), "", &[]).map(Arc::new)
    }

    fn task(&self) -> TextTask {
        let line = serde_json::json!({"id": "p", "question": QUESTION, "answer": "42"}).to_string();
        let problem = parse_problems(Path::new("p.jsonl"), line.as_bytes()).unwrap().remove(0);
        TextTask::new(self.compiled(pack()).unwrap(), problem).unwrap()
    }

    fn decode(&self, parts: &[&[u32]]) -> String {
        self.tokenizer.decode(&parts.concat()).unwrap()
    }

    fn render(&self, messages: &[Message]) -> String {
        let variables = pack().chat.unwrap().variables;
        self.template.render(messages, &RenderOptions { variables, ..RenderOptions::prompt() }).unwrap()
    }
}

fn user(approach: &str) -> Message {
    let pack = pack();
    Message::user(pack.problem.replace("{question}", QUESTION) + &pack.approach.replace("{approach}", approach))
}

const FAMILIES: [&str; 11] =
    ["llama3", "llama3_1", "chatml", "qwen2_5", "qwen3", "mistral", "falcon3", "phi3", "phi4_mini", "gemma", "olmo2"];

/// SentencePiece sets a space behind special tokens, and the templates of its families may set another.
fn one_space(text: &str) -> String {
    let mut text = text.replace("[/INST]", "[/INST] ").replace("|>", "|> ");
    for (some, one) in [(" \n", "\n"), ("\n ", "\n"), ("  ", " ")] {
        while text.contains(some) {
            text = text.replace(some, one);
        }
    }
    text
}

#[test]
fn a_branch_is_the_template_rendered_and_so_are_its_tokens() {
    for name in FAMILIES {
        let family = family(name);
        let task = family.task();
        for (i, approach) in pack().approaches.iter().enumerate() {
            let prompt = family.render(&[user(approach)]);
            let parts = [task.root(), task.branch(i).unwrap()];
            assert_eq!(parts.concat(), family.tokenizer.encode(&prompt).unwrap(), "{name}: the seam shows");
            assert_eq!(one_space(&family.decode(&parts)), one_space(&prompt), "{name}");
        }
    }
}

#[test]
fn a_verification_is_appended_as_the_template_would_go_on() {
    let said = "24 + 18 = 42 rolls.\n#### 42";
    for name in FAMILIES {
        let family = family(name);
        let task = family.task();
        let before = [task.root(), task.branch(0).unwrap()].concat();
        // As the model would have said it there.
        let said_tokens = family.tokenizer.encode_behind(&family.decode(&[&before]), said).unwrap();
        let asked = family.decode(&[&before, &said_tokens, task.verify_suffix()]);
        let ask = Message::user(&pack().verify_suffix);
        let history = [user(&pack().approaches[0]), Message::assistant(said, ""), ask];
        let rendered = family.render(&history);
        match name {
            // A thinking model's own turn began with an empty block, which history does not repeat.
            "qwen3" => assert_eq!(asked.replacen("<think>\n\n</think>\n\n24 + 18", "24 + 18", 1), rendered),
            _ => assert_eq!(one_space(&asked), one_space(&rendered), "{name}"),
        }
        let fresh = family.decode(&[&task.verify_fresh(&said_tokens).unwrap()]);
        let pack = pack();
        let text = pack.verify_fresh.replace("{question}", QUESTION).replace("{proposal}", said);
        assert_eq!(one_space(&fresh), one_space(&family.render(&[Message::user(text)])), "{name}");
    }
}

#[test]
fn verdicts_are_single_tokens_where_they_are_said() {
    for name in FAMILIES {
        let family = family(name);
        let task = family.task();
        let (yes, no) = task.verdict_tokens();
        let texts = |ids: &[u32]| ids.iter().map(|&id| family.tokenizer.token_bytes(id).to_vec()).collect::<Vec<_>>();
        for (list, word) in [(yes, "yes"), (no, "no")] {
            assert!(!list.is_empty());
            for bytes in texts(list) {
                assert_eq!(String::from_utf8(bytes).unwrap().trim().to_lowercase(), word, "{name}");
            }
        }
        assert!(yes.iter().all(|id| !no.contains(id)));
    }
    let family = family("llama3");
    let pack = PromptPack { yes: vec!["indeed it is".into(), "quite".into()], ..pack() };
    let error = family.compiled(pack).unwrap_err().to_string();
    assert!(error.contains("prompts: yes") && error.contains("indeed it is"), "{error}");
}

#[test]
fn reasoning_that_the_prompt_opens_is_closed_before_a_verdict() {
    let family = family("deepseek_r1");
    let task = family.task();
    assert!(family.decode(&[task.root(), task.branch(0).unwrap()]).ends_with("<｜Assistant｜><think>\n"));
    for text in [family.decode(&[task.verify_suffix()]), family.decode(&[&task.verify_fresh(&[]).unwrap()])] {
        assert!(text.ends_with("<｜Assistant｜><think>\n\n</think>\n\n"), "{text}");
    }
    assert!(family.decode(&[task.verify_suffix()]).starts_with("<｜end▁of▁sentence｜><｜User｜>"));
}

#[test]
fn the_pack_needs_a_template_that_repeats_what_is_said() {
    let family = family("llama3");
    let error = CompiledPack::new(pack(), family.tokenizer.clone(), "", &[]).unwrap_err().to_string();
    assert!(error.contains("no chat template"), "{error}");
    let shouting = super::template("{% for m in messages %}{{ m.content | upper }}{% endfor %}").unwrap();
    let error = CompiledPack::with_template(pack(), &shouting, family.tokenizer, "", &[]).unwrap_err().to_string();
    assert!(error.contains("t.jinja") && error.contains("does not repeat"), "{error}");
}

#[test]
fn answers_are_found_in_every_usual_spelling() {
    let finder = pack().answer_finder().unwrap();
    for (text, answer) in [
        ("so\n#### 42", "42"),
        ("####  $1,234.50.", "1,234.50"),
        (r"Thus \boxed{-7}.", "-7"),
        (r"\[\boxed{\$ 12}\]", "12"),
        ("The answer is 18.", "18"),
        ("the final Answer is: **3.5**, surely", "3.5"),
        (r"The answer is \(42\).", "42"),
        ("#### 1\nno:\n#### 2", "2"),
    ] {
        assert_eq!(finder.find(text).as_deref(), Some(answer), "{text}");
    }
    assert_eq!(finder.find("42 rolls"), None);
}

#[test]
fn solving_computes_the_prompt_once_and_appends_everything_else() {
    for name in ["qwen2_5", "llama3_1"] {
        let family = family(name);
        let task = family.task();
        let mut engine = random_engine(family.model.clone());
        for verify in [VerifyMode::Suffix, VerifyMode::FreshShared] {
            let config =
                SolverConfig { num_branches: 4, max_new_tokens: 12, verify, ..SolverConfig::preset(Policy::Exact) };
            let task: Box<dyn Task> = Box::new(family.task());
            let result = common::solve(&mut engine, &config, std::slice::from_ref(&task)).remove(0);
            let own: usize = (0..4).map(|i| task.branch(i).unwrap().len()).sum();
            assert_eq!(
                result.tokens.prefill,
                (task.root().len() + own) as u64,
                "{name}: the prompt ran more than once"
            );
            assert!(result.blocks_shared >= task.root().len() / 16, "{name}");
            let suffix = task.verify_suffix().len();
            assert_eq!(result.verify.run, 4);
            if verify == VerifyMode::Suffix {
                // The suffix, and of a branch that ran into its limit the token that nobody had computed.
                let verified = result.tokens.verify as usize;
                assert!((4 * suffix..=4 * (suffix + 1)).contains(&verified), "{name}: {verified} for 4 x {suffix}");
            }
            for b in &result.branches {
                assert!((0.0..=1.0).contains(&b.score.unwrap()), "{name}");
                assert_verdict_is_of_the_extension(
                    &mut engine,
                    task.as_ref(),
                    b.branch,
                    &b.tokens,
                    b.score.unwrap(),
                    verify,
                );
            }
        }
        assert_eq!(task.end_tokens().len(), 1, "{name}: the token that closes a turn ends a branch");
    }
}

/// The verdict is that of the branch's own tokens with the suffix behind them, or of the fresh prompt, alone in an engine.
fn assert_verdict_is_of_the_extension(
    engine: &mut Engine,
    task: &dyn Task,
    branch: usize,
    said: &[u32],
    score: f64,
    verify: VerifyMode,
) {
    let prompt = match verify {
        VerifyMode::Suffix => [task.root(), task.branch(branch).unwrap(), said, task.verify_suffix()].concat(),
        _ => task.verify_fresh(said).unwrap(),
    };
    let (yes, no) = task.verdict_tokens();
    let options = PrefillOptions { use_prefix_cache: false, ..PrefillOptions::default() };
    let alone = engine.prefill(&prompt, options).unwrap();
    engine.watch(alone, &[yes, no].concat(), 0).unwrap();
    common::run_all(engine);
    let watched = engine.row(alone).unwrap().unwrap().watched.clone();
    let mass = |xs: &[f32]| xs.iter().map(|&x| f64::from(x).exp()).sum::<f64>();
    let (yes, no) = (mass(&watched[..yes.len()]), mass(&watched[yes.len()..]));
    assert_eq!((yes / (yes + no)).to_bits(), score.to_bits());
    engine.prune(alone).unwrap();
}
