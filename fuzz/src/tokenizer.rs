//! A tokenizer and a text. What begins with `{` is a tokenizer.json, up to a zero byte; otherwise the first byte picks a
//! sound one, so that encoding and decoding are reached at once. The text is behind it.

use std::path::Path;
use std::sync::LazyLock;

use rksc::tokenizer::{StopMatcher, Tokenizer};

/// The sound ones. The first is plain byte-level BPE, which loses nothing.
static SOUND: LazyLock<[Tokenizer; 3]> = LazyLock::new(|| {
    let files: [&[u8]; 3] = [
        include_bytes!("../../models/tinymath/tokenizer.json"),
        include_bytes!("../../tests/chat/tokenizers/mistral.json"),
        include_bytes!("../../tests/chat/tokenizers/llama3.json"),
    ];
    files.map(|bytes| Tokenizer::from_bytes(Path::new("tokenizer.json"), bytes).expect("it is sound"))
});

/// See the module text.
pub fn tokenizer(data: &[u8]) {
    if data.first() == Some(&b'{') {
        let (file, text) = super::split_once(data, 0);
        if let Ok(tokenizer) = Tokenizer::from_bytes(Path::new("tokenizer.json"), file) {
            check(&tokenizer, text);
        }
        return;
    }
    let Some((&first, text)) = data.split_first() else { return };
    let idx = usize::from(first) % SOUND.len();
    check(&SOUND[idx], text);
    let text = String::from_utf8_lossy(text);
    if idx == 0 {
        let ids = SOUND[0].encode(&text).expect("it is sound");
        assert_eq!(SOUND[0].decode(&ids).expect("it is sound"), text);
    }
    check_stops(&text);
}

/// Text to ids and back, and the bytes as ids that nobody encoded.
fn check(tokenizer: &Tokenizer, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(ids) = tokenizer.encode(&text) {
        check_stream(tokenizer, &ids);
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        let _ = tokenizer.encode_behind("a", &text);
    }
    let ids: Vec<u32> = bytes.as_chunks().0.iter().map(|&id| u32::from_le_bytes(id) % 70_000).collect();
    check_stream(tokenizer, &ids);
}

/// A stream of tokens, and a fork of it in the middle, say what the whole says.
fn check_stream(tokenizer: &Tokenizer, ids: &[u32]) {
    let whole = tokenizer.decode(ids).expect("any ids decode");
    let (mut stream, mut text) = (tokenizer.decoder(), String::new());
    let mut fork = None;
    for (i, &id) in ids.iter().enumerate() {
        if i == ids.len() / 2 {
            fork = Some((stream.clone(), text.clone()));
        }
        text += &stream.push(id).expect("any id decodes");
    }
    assert_eq!(text + &stream.flush(), whole);
    let Some((mut stream, mut text)) = fork else { return };
    for &id in &ids[ids.len() / 2..] {
        text += &stream.push(id).expect("any id decodes");
    }
    assert_eq!(text + &stream.flush(), whole);
    let visible = tokenizer.decode_visible(ids).expect("any ids decode");
    assert!(visible.len() <= whole.len() || ids.iter().any(|&id| tokenizer.is_special(id)));
}

/// What a stop string cuts off does not depend on how the text comes in pieces. The first line is the stop string.
fn check_stops(text: &str) {
    let Some((stop, text)) = text.split_once('\n') else { return };
    let run = |pieces: &mut dyn Iterator<Item = &str>| {
        let mut matcher = StopMatcher::new(vec![stop.to_owned(), format!("{stop}{stop}")]);
        let shown: String = pieces.map(|piece| matcher.push(piece).0).collect();
        let hit = matcher.hit();
        (shown + &matcher.flush(), hit)
    };
    let whole = run(&mut std::iter::once(text));
    assert_eq!(run(&mut text.split_inclusive(|_| true)), whole);
    match text.find(stop).filter(|_| !stop.is_empty()) {
        Some(at) => assert_eq!(whole, (text[..at].to_owned(), Some(0))),
        None => assert_eq!(whole, (text.to_owned(), None)),
    }
}
