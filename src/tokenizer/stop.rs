//! Stop strings that may be spread over tokens.

use super::IncrementalDecoder;
use crate::error::Result;

/// Watches a stream of text for stop strings and holds back what may be the beginning of one.
///
/// The first stop string to be *complete* wins (the longest, if several end together), so the outcome does not depend
/// on how the text is cut into pieces. What comes out is the text before it, and no character of it.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Not emitted yet: a proper prefix of some stop string, and the longest such end of the text so far.
    held: String,
    hit: Option<usize>,
}

impl StopMatcher {
    /// Watches for `stops`; empty strings never match.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), hit: None }
    }

    /// Takes the next piece of text; returns what may be shown, and the index of the stop string that was found.
    /// From then on nothing more comes out.
    pub fn push(&mut self, text: &str) -> (String, Option<usize>) {
        if self.hit.is_some() {
            return (String::new(), self.hit);
        }
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| !stop.is_empty())
            .filter_map(|(i, stop)| self.held.find(stop.as_str()).map(|start| (start + stop.len(), start, i)))
            .min();
        if let Some((_, start, index)) = first {
            self.held.truncate(start);
            self.hit = Some(index);
            return (std::mem::take(&mut self.held), self.hit);
        }
        let keep = self.held_from();
        let tail = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, tail), None)
    }

    /// The stop string found so far.
    pub fn hit(&self) -> Option<usize> {
        self.hit
    }

    /// What is held back, when no more text comes.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Where the longest end of `held` that begins a stop string starts.
    fn held_from(&self) -> usize {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let bytes = self.held.as_bytes();
        (bytes.len().saturating_sub(longest.saturating_sub(1))..bytes.len())
            .find(|&at| {
                self.held.is_char_boundary(at) && self.stops.iter().any(|s| s.as_bytes().starts_with(&bytes[at..]))
            })
            .unwrap_or(bytes.len())
    }
}

/// Watches a branch's tokens for stop strings. Each token is decoded once, however often it is asked.
#[derive(Clone, Debug)]
pub struct StopScanner {
    decoder: IncrementalDecoder,
    stops: StopMatcher,
    num_seen: usize,
}

impl StopScanner {
    /// Watches for `stops` in what `decoder` makes of the tokens.
    pub fn new(decoder: IncrementalDecoder, stops: Vec<String>) -> Self {
        Self { decoder, stops: StopMatcher::new(stops), num_seen: 0 }
    }

    /// `tokens` are all of the branch's so far: those seen in earlier calls, then new ones. Returns how many come
    /// before the first that completes a stop string.
    pub fn scan(&mut self, tokens: &[u32]) -> Result<Option<usize>> {
        while self.stops.hit().is_none()
            && let Some(&token) = tokens.get(self.num_seen)
        {
            self.stops.push(&self.decoder.push(token)?);
            self.num_seen += 1;
        }
        Ok(self.stops.hit().map(|_| self.num_seen - 1))
    }
}
