//! Text to tokens and back: golden ids, streams that equal the whole, stop strings across tokens.

use std::path::Path;

use rksc::tokenizer::{StopMatcher, StopScanner, Tokenizer};

fn bundled() -> Tokenizer {
    Tokenizer::from_file(Path::new("models/tinymath/tokenizer.json")).unwrap()
}

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn text(&mut self, max_chars: usize) -> String {
        let pieces = [
            "a",
            " 7",
            "\n",
            "é",
            "你",
            "好",
            "한",
            "😀",
            "👩‍👩‍👧",
            "🇩🇪",
            " YES",
            "\u{301}",
            "ا",
            "\t",
            "<think>",
            "\u{fffd}",
        ];
        (0..self.below(max_chars + 1)).map(|_| pieces[self.below(pieces.len())]).collect()
    }
}

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.decoder();
    let mut text = String::new();
    for &id in ids {
        text += &decoder.push(id).unwrap();
    }
    text + &decoder.flush()
}

#[test]
fn golden_cases_are_equal() {
    let tokenizer = bundled();
    let cases: serde_json::Value =
        serde_json::from_slice(&std::fs::read("models/tinymath/golden/tokenizer_cases.json").unwrap()).unwrap();
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 13);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
}

#[test]
fn golden_prompts_round_trip() {
    let tokenizer = bundled();
    let prefix = std::fs::read_to_string("models/tinymath/problems/fewshot_prefix_1024.txt").unwrap();
    let ids = tokenizer.encode(&prefix).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), prefix);
}

#[test]
fn single_tokens_and_special_tokens() {
    let tokenizer = bundled();
    assert_eq!((tokenizer.single_token(" YES"), tokenizer.single_token(" NO")), (Some(413), Some(408)));
    assert_eq!((tokenizer.single_token("not one token"), tokenizer.single_token("")), (None, None));
    assert_eq!((tokenizer.token_id("<|eos|>"), tokenizer.token_id("<|nothing|>")), (Some(1), None));
    assert_eq!((tokenizer.token_bytes(413), tokenizer.token_bytes(1)), (&b" YES"[..], &b"<|eos|>"[..]));
    assert!(tokenizer.token_bytes(768).is_empty() && tokenizer.token_bytes(u32::MAX).is_empty());
    assert!(
        tokenizer.is_special(0) && tokenizer.is_special(4) && !tokenizer.is_special(5) && !tokenizer.is_special(413)
    );
    let ids = tokenizer.encode("<|bos|><think>x</think><|eos|>").unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "<|bos|><think>x</think><|eos|>");
    assert_eq!(tokenizer.decode_visible(&ids).unwrap(), "<think>x</think>");
}

#[test]
fn encoding_pieces_cut_before_a_newline_or_space_is_append_only() {
    let tokenizer = bundled();
    let mut rng = Rng(3);
    for _ in 0..300 {
        let (a, b) = (rng.text(12), rng.text(12));
        let whole = format!("{a}\nStep 1:{b} YES");
        let mut parts = tokenizer.encode(&a).unwrap();
        parts.extend(tokenizer.encode(&format!("\nStep 1:{b}")).unwrap());
        parts.extend(tokenizer.encode(" YES").unwrap());
        if !a.ends_with(char::is_whitespace) && !b.ends_with(char::is_whitespace) {
            assert_eq!(parts, tokenizer.encode(&whole).unwrap(), "{whole:?}");
        }
    }
}

#[test]
fn streams_of_text_show_no_half_characters() {
    let tokenizer = bundled();
    let mut rng = Rng(1);
    for _ in 0..10_000 {
        let text = rng.text(24).replace('\u{fffd}', "");
        let ids = tokenizer.encode(&text).unwrap();
        let mut decoder = tokenizer.decoder();
        let mut got = String::new();
        for &id in &ids {
            let piece = decoder.push(id).unwrap();
            assert!(!piece.contains('\u{fffd}'), "{text:?} gave {piece:?}");
            got += &piece;
        }
        assert_eq!(decoder.flush(), "");
        assert_eq!(got, text);
    }
}

#[test]
fn streams_of_random_tokens_equal_the_lossy_whole() {
    let tokenizer = bundled();
    let mut rng = Rng(2);
    for round in 0..10_000 {
        // Every other round from the 256 single bytes only, where invalid UTF-8 abounds; some ids do not exist.
        let range = if round % 2 == 0 { 7..263 } else { 0..800 };
        let ids: Vec<u32> = (0..rng.below(40)).map(|_| range.start + rng.below(range.len()) as u32).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        let whole = String::from_utf8_lossy(&bytes);
        assert_eq!(stream(&tokenizer, &ids), whole);
        assert_eq!(tokenizer.decode(&ids).unwrap(), whole);
    }
}

#[test]
fn decoding_matches_the_reference_implementation() {
    let tokenizer = bundled();
    let reference = tokenizers::Tokenizer::from_file("models/tinymath/tokenizer.json").unwrap();
    let mut rng = Rng(4);
    for _ in 0..2000 {
        let ids: Vec<u32> = (0..rng.below(30)).map(|_| rng.below(800) as u32).collect();
        assert_eq!(tokenizer.decode(&ids).unwrap(), reference.decode(&ids, false).unwrap());
        assert_eq!(tokenizer.decode_visible(&ids).unwrap(), reference.decode(&ids, true).unwrap());
    }
}

#[test]
fn a_forked_decoder_goes_its_own_way() {
    let tokenizer = bundled();
    let ids = tokenizer.encode("你").unwrap();
    assert!(ids.len() > 1, "the test needs a character of several tokens");
    let mut one = tokenizer.decoder();
    assert_eq!(one.push(ids[0]).unwrap(), "");
    let mut two = one.clone();
    for &id in &ids[1..ids.len() - 1] {
        one.push(id).unwrap();
    }
    assert_eq!(one.push(*ids.last().unwrap()).unwrap(), "你");
    assert_eq!(two.push(413).unwrap(), "\u{fffd} YES");
}

#[test]
fn sentencepiece_files_stream_too() {
    let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"</s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],
      "normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
      "pre_tokenizer":null,"post_processor":null,
      "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
      "model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,
      "vocab":{"</s>":0,"▁":1,"a":2,"b":3,"<0xE4>":4,"<0xBD>":5,"<0xA0>":6,"<0x0A>":7},"merges":[]}}"#;
    let tokenizer = Tokenizer::from_bytes(Path::new("spm.json"), json.as_bytes());
    let tokenizer = tokenizer.unwrap();
    let ids = tokenizer.encode("a b你\n").unwrap();
    assert_eq!(ids, [1, 2, 1, 3, 4, 5, 6, 7]);
    assert_eq!(tokenizer.decode(&ids).unwrap(), "a b你\n");
    let mut decoder = tokenizer.decoder();
    let pieces: Vec<String> = ids.iter().map(|&id| decoder.push(id).unwrap()).collect();
    assert_eq!(pieces, ["", "a", " ", "b", "", "", "你", "\n"]);
    assert_eq!(tokenizer.decode(&[1, 1, 2]).unwrap(), " a");
}

#[test]
fn truncation_padding_and_templates_in_the_file_change_nothing() {
    let text = std::fs::read_to_string("models/tinymath/tokenizer.json").unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    // A stride that is not below max_length makes `tokenizers` panic when it truncates.
    json["truncation"] = serde_json::json!({"direction":"Right","max_length":4,"strategy":"LongestFirst","stride":9});
    json["padding"] = serde_json::json!({"strategy":{"Fixed":64},"direction":"Right","pad_to_multiple_of":null,"pad_id":2,"pad_type_id":0,"pad_token":"<|pad|>"});
    // And a template that names a special token which is not there makes it panic when it adds special tokens.
    let item = serde_json::json!([{"SpecialToken":{"id":"[X]","type_id":0}},{"Sequence":{"id":"A","type_id":0}}]);
    json["post_processor"] =
        serde_json::json!({"type":"TemplateProcessing","single":item,"pair":item,"special_tokens":{}});
    let tokenizer = Tokenizer::from_bytes(Path::new("tokenizer.json"), json.to_string().as_bytes()).unwrap();
    let text = "Tom has 7 apples. He buys 5 more.";
    assert_eq!(tokenizer.encode(text).unwrap(), bundled().encode(text).unwrap());
}

/// What a matcher must do, said the slow way: the first end of any stop string, longest first.
fn first_stop(stops: &[String], text: &str) -> Option<(usize, usize)> {
    for end in 1..=text.len() {
        let ending =
            stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && text.as_bytes()[..end].ends_with(s.as_bytes()));
        if let Some((i, s)) = ending.max_by(|a, b| a.1.len().cmp(&b.1.len()).then(b.0.cmp(&a.0))) {
            return Some((end - s.len(), i));
        }
    }
    None
}

#[test]
fn stop_matcher_holds_its_laws_on_random_cases() {
    let mut rng = Rng(5);
    let alphabet = ['a', 'b', 'a', 'b', '\n', 'é', '你'];
    let word = |rng: &mut Rng, max: usize| -> String {
        (0..rng.below(max + 1)).map(|_| alphabet[rng.below(alphabet.len())]).collect()
    };
    let mut hits = 0;
    for _ in 0..10_000 {
        let stops: Vec<String> = (0..rng.below(4)).map(|_| word(&mut rng, 5)).collect();
        let text = word(&mut rng, 30);
        let expected = first_stop(&stops, &text);
        hits += usize::from(expected.is_some());
        let allowed = expected.map_or(text.as_str(), |(start, _)| &text[..start]);

        let mut matcher = StopMatcher::new(stops.clone());
        let (mut shown, mut seen, mut hit) = (String::new(), 0, None);
        let chars: Vec<char> = text.chars().collect();
        let mut at = 0;
        while at < chars.len() {
            let n = (rng.below(4)).min(chars.len() - at);
            let piece: String = chars[at..at + n].iter().collect();
            at += n;
            let (emit, found) = matcher.push(&piece);
            seen += piece.len();
            shown += &emit;
            hit = found;
            assert!(allowed.starts_with(&shown), "{stops:?} {text:?}: leaked {shown:?}");
            if found.is_none() {
                // Nothing is held without need: what is held begins some stop string.
                let held = &text[shown.len()..seen];
                assert!(held.is_empty() || stops.iter().any(|s| s.len() > held.len() && s.starts_with(held)));
            }
        }
        shown += &matcher.flush();
        assert_eq!(shown, allowed, "{stops:?} {text:?}");
        assert_eq!((hit, matcher.hit()), (expected.map(|(_, i)| i), expected.map(|(_, i)| i)), "{stops:?} {text:?}");
        // "more" shares no character with the stop strings.
        assert_eq!(matcher.push("more").0, if hit.is_some() { "" } else { "more" });
    }
    assert!(hits > 1000, "only {hits} cases had a stop");
}

#[test]
fn stop_strings_are_found_across_tokens() {
    let tokenizer = bundled();
    let ids = tokenizer.encode("6-2=4\nThe answer is 4.\n\nProblem: Ann").unwrap();
    let mut decoder = tokenizer.visible_decoder();
    let mut matcher = StopMatcher::new(vec!["\nStep".into(), "\n\nProblem:".into()]);
    let mut shown = String::new();
    let hit = ids.iter().find_map(|&id| {
        let (emit, hit) = matcher.push(&decoder.push(id).unwrap());
        shown += &emit;
        hit
    });
    assert_eq!((hit, shown.as_str()), (Some(1), "6-2=4\nThe answer is 4."));
}

#[test]
fn a_scanner_keeps_the_tokens_before_the_first_that_completes_a_stop_string() {
    let tokenizer = bundled();
    let mut rng = Rng(77);
    let mut hits = 0;
    for case in 0..2_000 {
        let len = 1 + rng.below(40);
        let ids: Vec<u32> = (0..len).map(|_| rng.below(tokenizer.vocab_size()) as u32).collect();
        let texts: Vec<String> = (0..=len).map(|n| tokenizer.decode(&ids[..n]).unwrap()).collect();
        // Pieces of the text itself, cut anywhere, and one that is not in it. Half a character is nobody's stop string.
        let chars: Vec<char> = texts[len].chars().collect();
        let piece = |rng: &mut Rng| -> String {
            let from = rng.below(chars.len());
            chars[from..].iter().take(1 + rng.below(6)).filter(|&&c| c != char::REPLACEMENT_CHARACTER).collect()
        };
        let stops: Vec<String> =
            [piece(&mut rng), piece(&mut rng), "\u{2603}".into()].into_iter().filter(|s| !s.is_empty()).collect();
        // The slow way: the whole text after every token.
        let expected = (1..=len).find(|&n| stops.iter().any(|s| texts[n].contains(s.as_str()))).map(|n| n - 1);
        hits += usize::from(expected.is_some());
        let mut scanner = StopScanner::new(tokenizer.decoder(), stops.clone());
        assert_eq!(scanner.clone().scan(&ids).unwrap(), expected, "case {case}: {stops:?} all at once");
        let mut seen = 0;
        while seen < len {
            seen = (seen + rng.below(4)).min(len);
            let due = expected.filter(|&keep| keep < seen);
            assert_eq!(scanner.scan(&ids[..seen]).unwrap(), due, "case {case}: {stops:?} after {seen} tokens");
        }
    }
    assert!(hits > 1_000, "only {hits} cases had a stop");
}
