//! A conversation computes what the turn before did not, and says what it would have said without a past.

use std::sync::Arc;

use rksc::chat::{Message, RenderOptions, ReplyPart, Session, ThinkTags};
use rksc::engine::{Engine, EventKind, GenerateParams};
use rksc::kv::budget::{KvLimit, KvPrompt};
use rksc::tokenizer::Tokenizer;

use super::common::{self, EOS, engine, greedy_to_end, uncached};
use super::template;

const ASK: [&str; 3] = [
    "Tom has 5 apples and buys 7 more. How many apples does he have?",
    "Ann has 9 coins and finds 3 more. How many coins does she have?",
    "Ben has 12 pens and loses 4. How many pens does he have?",
];

/// The bundled model's words, with an end token behind each reply.
const PLAIN: &str = "<|bos|>{% for m in messages %}{% if m.role == 'user' %}Problem: {{ m.content }}\nApproach #1: Use short \
equations.\nStep 1:{% else %}{{ m.content }}<|eos|>\n{% endif %}{% endfor %}";

/// Drops what was said before a mark, once it is history.
const FORGETFUL: &str = "<|bos|>{% for m in messages %}{% if m.role == 'user' %}Problem: {{ m.content }}\nApproach #1: Use \
short equations.\nStep 1:{% else %}{{ m.content.split('\n')[-1] }}<|eos|>\n{% endif %}{% endfor %}";

struct Talk {
    engine: Engine,
    session: Session,
    tokenizer: Arc<Tokenizer>,
}

#[derive(Debug, PartialEq)]
struct Reply {
    text: String,
    num_tokens: usize,
    num_kept: usize,
    num_generated: usize,
    computed: u64,
}

fn talk(source: &str, limit: Option<KvLimit>) -> Talk {
    let tokenizer = common::tokenizer();
    let session = Session::new(template(source).unwrap(), tokenizer.clone(), RenderOptions::default(), limit);
    Talk { engine: engine(|_| {}), session, tokenizer }
}

impl Talk {
    fn reply(&mut self, params: GenerateParams) -> Reply {
        let before = self.engine.engine_stats().tokens_computed;
        let placed = self.session.place(&mut self.engine).unwrap();
        let held = self.engine.tokens(placed.branch).unwrap().to_vec();
        assert_eq!(held.len(), placed.num_tokens);
        self.engine.start(placed.branch, params).unwrap();
        common::run_all(&mut self.engine);
        let generated = self.engine.tokens(placed.branch).unwrap()[held.len()..].to_vec();
        let text = self.tokenizer.decode(&generated).unwrap();
        self.session.push(Message::assistant(&text, ""));
        self.engine.check_integrity().unwrap();
        assert_eq!(self.engine.engine_stats().branches, 1);
        Reply {
            text,
            num_tokens: placed.num_tokens,
            num_kept: placed.num_kept,
            num_generated: generated.len(),
            computed: self.engine.engine_stats().tokens_computed - before,
        }
    }

    fn ask(&mut self, question: &str) -> Reply {
        self.session.push(Message::user(question));
        self.reply(greedy_to_end())
    }
}

/// What an engine without a past says to these messages.
fn afresh(source: &str, messages: &[Message]) -> String {
    let tokenizer = common::tokenizer();
    let prompt = template(source).unwrap().render(messages, &RenderOptions::prompt()).unwrap();
    let prompt = tokenizer.encode(&prompt).unwrap();
    let mut engine = engine(|_| {});
    let branch = engine.prefill(&prompt, uncached()).unwrap();
    engine.start(branch, greedy_to_end()).unwrap();
    common::run_all(&mut engine);
    tokenizer.decode(&engine.tokens(branch).unwrap()[prompt.len()..]).unwrap()
}

#[test]
fn every_turn_computes_only_what_is_new() {
    let mut talk = talk(PLAIN, None);
    let mut held = 0;
    for (i, question) in ASK.into_iter().enumerate() {
        let before = talk.session.messages().to_vec();
        let reply = talk.ask(question);
        assert!(reply.num_generated > 5, "{reply:?}");
        // All that was there: the prompt before and the reply, which reads back as the tokens it was.
        assert_eq!(reply.num_kept, held, "turn {i}");
        let new = reply.num_tokens - reply.num_kept;
        assert_eq!(reply.computed, (new + reply.num_generated) as u64, "turn {i}");
        held = reply.num_tokens + reply.num_generated;
        assert_eq!(reply.text, afresh(PLAIN, &[before, vec![Message::user(question)]].concat()), "turn {i}");
    }
}

#[test]
fn an_edit_costs_what_follows_it() {
    let mut talk = talk(PLAIN, None);
    for question in ASK {
        talk.ask(question);
    }
    let (old, tokenizer) = (talk.session.messages().to_vec(), talk.tokenizer.clone());
    talk.session.edit(2, ASK[2]).unwrap();
    assert_eq!(talk.session.messages().len(), 3);
    let tokens = |messages: &[Message]| {
        tokenizer.encode(&template(PLAIN).unwrap().render(messages, &RenderOptions::prompt()).unwrap()).unwrap()
    };
    let (was, is) = (tokens(&old), tokens(talk.session.messages()));
    let common = was.iter().zip(&is).take_while(|(a, b)| a == b).count();
    assert!(common > 20 && common < is.len());
    let expected = afresh(PLAIN, talk.session.messages());
    let reply = talk.reply(greedy_to_end());
    assert_eq!((reply.num_kept, reply.text), (common, expected));
    assert_eq!(reply.computed, (is.len() - common + reply.num_generated) as u64);
    for n in [0, 3] {
        assert!(talk.session.edit(n, "x").unwrap_err().to_string().contains("there are 2 to edit"));
    }
}

#[test]
fn a_turn_taken_back_and_said_again_computes_one_row() {
    let mut talk = talk(PLAIN, None);
    talk.ask(ASK[0]);
    let first = talk.ask(ASK[1]);
    assert_eq!(talk.session.undo().unwrap().text(), ASK[1]);
    let again = talk.ask(ASK[1]);
    assert_eq!((again.num_kept, &again.text), (first.num_tokens, &first.text));
    assert_eq!(again.computed, 1 + again.num_generated as u64);
    // Without its reply, a reset conversation starts at once from what the system has said: here from nothing.
    talk.session.reset();
    assert!(talk.session.messages().is_empty() && talk.session.undo().is_none());
}

#[test]
fn a_template_that_forgets_costs_from_there_on() {
    let mut talk = talk(FORGETFUL, None);
    let first = talk.ask(ASK[0]);
    assert!(first.text.contains('\n'), "{}", first.text);
    let before = talk.session.messages().to_vec();
    let second = talk.ask(ASK[1]);
    // Of the reply its last line is left: the prompt stays, and little more.
    assert!((first.num_tokens..first.num_tokens + 5).contains(&second.num_kept), "{second:?}");
    assert_eq!(second.computed, (second.num_tokens - second.num_kept + second.num_generated) as u64);
    assert_eq!(second.text, afresh(FORGETFUL, &[before, vec![Message::user(ASK[1])]].concat()));
}

#[test]
fn under_a_kv_budget_turns_go_on_and_an_edit_behind_a_cut_starts_anew() {
    let limit = KvLimit { prompt: KvPrompt::Pin, ..KvLimit::new(32) };
    let mut talk = talk(PLAIN, Some(limit));
    let generate = GenerateParams { max_new_tokens: 90, ..GenerateParams::default() };
    let mut ask = |question: &str| {
        talk.session.push(Message::user(question));
        let reply = talk.reply(generate.clone());
        (reply, talk.engine.engine_stats().kv_cuts)
    };
    let (first, cuts) = ask(ASK[0]);
    assert!(cuts > 0 && first.num_kept == 0);
    // Nothing is taken back, so that what was dropped is not missed; the last token said had not been computed.
    let (second, more_cuts) = ask(ASK[1]);
    assert_eq!((second.num_kept, more_cuts > cuts), (first.num_tokens + 89, true));
    talk.session.undo();
    talk.session.push(Message::user(ASK[2]));
    let third = talk.reply(generate);
    // A new branch, for which the prefix cache still has blocks of the prompt.
    let cached = talk.engine.engine_stats().tokens_from_cache;
    assert_eq!((third.num_kept, third.computed + cached), (0, (third.num_tokens + 89) as u64));
}

#[test]
fn a_cancelled_reply_leaves_a_conversation_that_goes_on() {
    let mut talk = talk(PLAIN, None);
    talk.session.push(Message::user(ASK[0]));
    let placed = talk.session.place(&mut talk.engine).unwrap();
    talk.engine.start(placed.branch, greedy_to_end()).unwrap();
    for _ in 0..4 {
        talk.engine.step().unwrap();
    }
    talk.engine.cancel_flag().raise();
    assert!(matches!(talk.engine.step(), Err(rksc::Error::Cancelled)));
    talk.engine.cancel_flag().clear();
    talk.engine.stop(placed.branch).unwrap();
    let said = talk.engine.tokens(placed.branch).unwrap()[placed.num_tokens..].to_vec();
    assert_eq!(said.len(), 4);
    talk.session.push(Message::assistant(talk.tokenizer.decode(&said).unwrap(), ""));
    while talk.engine.next_event().is_some() {}
    let before = talk.session.messages().to_vec();
    let reply = talk.ask(ASK[1]);
    // The last token said had not been computed yet.
    assert_eq!(reply.num_kept, placed.num_tokens + 3);
    assert_eq!(reply.text, afresh(PLAIN, &[before, vec![Message::user(ASK[1])]].concat()));
}

#[test]
fn a_prompt_beyond_the_context_is_refused_and_the_talk_goes_on() {
    let mut talk = talk(PLAIN, None);
    let first = talk.ask(ASK[0]);
    talk.session.push(Message::user("many words ".repeat(2000)));
    let error = talk.session.place(&mut talk.engine).unwrap_err().to_string();
    assert!(error.contains("exceed the model's context"), "{error}");
    talk.session.undo();
    let next = talk.ask(ASK[1]);
    assert!(next.num_kept >= first.num_tokens, "{next:?}");
    talk.session.clear(&mut talk.engine).unwrap();
    assert_eq!(talk.engine.engine_stats().branches, 0);
}

#[test]
fn families_say_which_token_ends_a_turn_and_which_tags_hold_reasoning() {
    for (family, end, tags) in [
        ("llama3", Some("<|eot_id|>"), None),
        ("llama3_1", Some("<|eot_id|>"), None),
        ("chatml", Some("<|im_end|>"), Some("<think>")),
        ("qwen3", Some("<|im_end|>"), Some("<think>")),
        ("deepseek_r1", Some("<｜end▁of▁sentence｜>"), Some("<think>")),
        ("mistral", Some("</s>"), None),
        ("phi3", Some("<|end|>"), None),
        ("gemma", Some("<end_of_turn>"), None),
        ("falcon3", Some("<|endoftext|>"), Some("<think>")),
    ] {
        let super::pack::Family { template, tokenizer, .. } = super::pack::family(family);
        assert_eq!(template.turn_end(&tokenizer), end.and_then(|t| tokenizer.token_id(t)), "{family}");
        let found = ThinkTags::of(&template, &tokenizer).map(|t| t.open);
        assert_eq!(found.as_deref(), tags, "{family}");
    }
}

#[test]
fn a_block_that_the_prompt_opened_is_reasoning_from_the_first_word() {
    let family = super::pack::family("deepseek_r1");
    let mut session = Session::new(family.template, family.tokenizer, RenderOptions::default(), None);
    session.push(Message::user("2 + 2?"));
    let mut engine = super::pack::random_engine(family.model);
    let mut splitter = session.place(&mut engine).unwrap().splitter;
    assert_eq!(splitter.push("add</th"), [ReplyPart::Reasoning("add".into())]);
    assert_eq!(splitter.push("ink>\n\n4"), [ReplyPart::Content("4".into())]);
}

#[test]
fn events_name_the_end_token_that_is_not_kept() {
    let mut talk = talk(PLAIN, None);
    talk.session.push(Message::user(ASK[0]));
    let placed = talk.session.place(&mut talk.engine).unwrap();
    talk.engine.start(placed.branch, greedy_to_end()).unwrap();
    let mut last = None;
    while talk.engine.has_work() {
        talk.engine.step().unwrap();
        while let Some(event) = talk.engine.next_event() {
            if let EventKind::Token(token) = event.kind {
                last = Some(token.token);
            }
        }
    }
    assert_eq!(last, Some(EOS));
    assert_ne!(talk.engine.tokens(placed.branch).unwrap().last(), Some(&EOS));
}
