//! `exit_rows`: which rows leave the backbone after a layer.
//!
//! formula: row t fires when, of the rows that decide for it, at most floor(share n) are not above tau; `route[t] = layer`
//! work split: none; a pass has few rows that may leave
//! tests: `tests/kernels/exit_rows.rs`

use crate::error::{Error, Result};
use crate::gate::Scope;

/// When a row fires.
pub enum Rule<'a> {
    /// Rows number `offset`, `offset + every`, ... of those in flight.
    EveryNth {
        /// Distance between rows, at least 1.
        every: u32,
        /// First row.
        offset: u32,
    },
    /// Enough cosines are above `tau`.
    Above {
        /// `[T]`.
        similarity: &'a [f32],
        /// The bound, strict.
        tau: f32,
        /// Of the n that decide, `floor(share n)` may fail.
        share: f32,
    },
}

impl Rule<'_> {
    /// Whether the rows `[start, end)`, at least one, let go those they decide for.
    fn fires(&self, [start, end]: [u32; 2]) -> bool {
        match *self {
            Self::EveryNth { every, offset } => {
                (end - 1).checked_sub(offset).is_some_and(|past| past.is_multiple_of(every.max(1)))
            }
            Self::Above { similarity, tau, share } => {
                let decide = &similarity[start as usize..end as usize];
                // A NaN is not above.
                let above = decide.iter().filter(|&&s| s > tau).count();
                decide.len() - above <= (share * decide.len() as f32) as usize
            }
        }
    }
}

/// Sets `route[t] = layer` for the rows that fire and are in the backbone. `exits[t]` are the rows that decide for row t;
/// empty where the gate has no say.
pub fn exit_rows(exits: &[[u32; 2]], rule: &Rule<'_>, scope: Scope, layer: u32, route: &mut [f32]) -> Result<()> {
    let num_rows = match rule {
        Rule::Above { similarity, .. } => similarity.len().min(route.len()),
        Rule::EveryNth { .. } => route.len(),
    };
    let may = |[start, end]: [u32; 2]| start < end;
    if exits.len() > num_rows || exits.iter().any(|&e| may(e) && e[1] as usize > num_rows) {
        let expected = format!("route and cosines of {} rows", exits.len());
        return Err(Error::Shape { op: "exit_rows", expected, got: format!("{num_rows}") });
    }
    let all = scope == Scope::Batch;
    if all && !exits.iter().all(|&e| !may(e) || rule.fires(e)) {
        return Ok(());
    }
    for (route, &decide) in route.iter_mut().zip(exits) {
        if may(decide) && route.is_infinite() && (all || rule.fires(decide)) {
            *route = layer as f32;
        }
    }
    Ok(())
}
