//! Files against the list that `sha256sum` wrote of them: a bit that has turned since is found, wherever it is.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use sha2::{Digest, Sha256};

use super::fingerprint::hex;
use crate::error::{Error, Result};
use crate::model::fields::read_small;

const MAX_LIST_BYTES: u64 = 1 << 20;

/// Compares every file that `list` names, relative to `dir`, and returns how many those are. The first that differs, or is
/// not there, is an error that names it.
pub fn check_sums(dir: &Path, list: &Path) -> Result<usize> {
    let bytes = read_small(list, MAX_LIST_BYTES)?;
    let text = std::str::from_utf8(&bytes).map_err(|e| Error::format(list, format!("not UTF-8: {e}")))?;
    let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (i, line) in lines() {
        let bad = || Error::format(list, format!("line {}: must be a SHA-256 in hex, two spaces and a file", i + 1));
        let (expected, name) = line.split_once([' ', '\t']).ok_or_else(bad)?;
        let is_sum = expected.len() == 64 && expected.bytes().all(|b| b.is_ascii_hexdigit());
        let name = Path::new(name.trim_start_matches([' ', '*']));
        let is_inside = name.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
        if !is_sum || !is_inside || name.as_os_str().is_empty() {
            return Err(bad());
        }
        let path = dir.join(name);
        let found = sum(&path)?;
        if !found.eq_ignore_ascii_case(expected) {
            let why = format!("its SHA-256 is {found}, and {} has {expected}; fetch it again", list.display());
            return Err(Error::format(path, why));
        }
    }
    match lines().count() {
        0 => Err(Error::format(list, "names no files")),
        count => Ok(count),
    }
}

fn sum(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part).map_err(|e| Error::io(path, e))? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(&part[..n]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_flipped_bit_is_found_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let (file, list) = (dir.path().join("w"), dir.path().join("sums"));
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 31 % 251) as u8).collect();
        std::fs::write(&file, &bytes).unwrap();
        std::fs::write(&list, format!("{}  w\n\n{} *./w\n", sum(&file).unwrap(), sum(&file).unwrap())).unwrap();
        assert_eq!(check_sums(dir.path(), &list).unwrap(), 2);
        for bit in [0, 7, 400_001, 8 * bytes.len() - 1] {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&file, &bytes).unwrap();
            let why = check_sums(dir.path(), &list).unwrap_err().to_string();
            assert!(why.contains("/w: its SHA-256 is"), "{why}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(check_sums(dir.path(), &list), Err(Error::Io { .. })));
    }

    #[test]
    fn a_list_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("sums");
        let zeros = "0".repeat(64);
        for text in ["", "w", "xyz  w", &format!("{zeros}  ../w"), &format!("{zeros}  /w"), &format!("{zeros}  ")] {
            std::fs::write(&list, text).unwrap();
            assert!(matches!(check_sums(dir.path(), &list), Err(Error::Format { .. })), "{text:?}");
        }
    }
}
