//! Which slots stay at a cut: the best by score, each (layer, kv head) for itself or several together, in the order in
//! which they stand. All rules come down to scores; equal ones go to the newer slot, and what is no number goes first.

use super::budget::Aggregation;

/// The slots that may be dropped, and their scores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Candidates<'a> {
    /// `[num_layers, num_kv_heads, stride]`, of the slots `[0, stride)` of a branch.
    pub(crate) scores: &'a [f32],
    pub(crate) num_layers: usize,
    pub(crate) num_kv_heads: usize,
    /// The slots `[first, end)` are candidates; `end <= stride`.
    pub(crate) first: usize,
    pub(crate) end: usize,
}

/// For each layer and kv head the `num_best` best candidates and then every slot `[end, num_slots)`, ascending:
/// `[num_layers, num_kv_heads, num_best + num_slots - end]`.
pub(crate) fn keep(c: &Candidates<'_>, num_best: usize, num_slots: usize, choosers: Aggregation) -> Vec<u32> {
    let num_heads = c.num_layers * c.num_kv_heads;
    let stride = c.scores.len() / num_heads.max(1);
    let num_best = num_best.min(c.end - c.first);
    let mut kept = Vec::with_capacity(num_heads * (num_best + num_slots - c.end));
    let of_head = |head: usize| &c.scores[head * stride + c.first..head * stride + c.end];
    let together = match choosers {
        Aggregation::Head => 1,
        Aggregation::Layer => c.num_kv_heads,
        Aggregation::Token => num_heads,
    };
    let mut order = Vec::new();
    for group in (0..num_heads).step_by(together.max(1)) {
        let best = match together {
            1 => best(of_head(group).iter().copied(), num_best, &mut order),
            _ => best(mean(c.end - c.first, (group..group + together).map(of_head)), num_best, &mut order),
        };
        let slots: Vec<u32> =
            best.into_iter().map(|i| (c.first + i) as u32).chain(c.end as u32..num_slots as u32).collect();
        (0..together).for_each(|_| kept.extend_from_slice(&slots));
    }
    kept
}

/// Indices of the `n` best, ascending.
fn best(scores: impl Iterator<Item = f32>, n: usize, order: &mut Vec<(f32, usize)>) -> Vec<usize> {
    order.clear();
    order.extend(scores.enumerate().map(|(i, s)| (if s.is_nan() { f32::NEG_INFINITY } else { s }, i)));
    let worse = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1));
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, worse);
    }
    let mut chosen: Vec<usize> = order[..n].iter().map(|&(_, i)| i).collect();
    chosen.sort_unstable();
    chosen
}

/// The heads' mean, place by place, in f64.
fn mean<'a>(len: usize, heads: impl Iterator<Item = &'a [f32]>) -> impl Iterator<Item = f32> {
    let (mut sum, mut num_heads) = (vec![0.0; len], 0);
    for head in heads {
        num_heads += 1;
        for (s, &x) in sum.iter_mut().zip(head) {
            *s += f64::from(x);
        }
    }
    sum.into_iter().map(move |s| (s / f64::from(num_heads)) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(scores: &[f32], num_layers: usize, num_kv_heads: usize, first: usize) -> Candidates<'_> {
        Candidates { scores, num_layers, num_kv_heads, first, end: scores.len() / (num_layers * num_kv_heads) }
    }

    #[test]
    fn each_head_keeps_its_best_in_order_and_the_window() {
        let scores = [0.1, 0.9, 0.3, 0.5, 0.8, 0.2, 0.4, 0.6];
        assert_eq!(keep(&candidates(&scores, 1, 2, 0), 2, 6, Aggregation::Head), [1, 3, 4, 5, 0, 3, 4, 5]);
        assert_eq!(keep(&candidates(&scores, 2, 1, 1), 1, 5, Aggregation::Head), [1, 4, 3, 4]);
    }

    #[test]
    fn ties_go_to_the_newer_and_what_is_no_number_goes_first() {
        let scores = [f32::NAN, 0.5, 0.5, 0.5, f32::NEG_INFINITY];
        assert_eq!(keep(&candidates(&scores, 1, 1, 0), 2, 5, Aggregation::Head), [2, 3]);
        assert_eq!(keep(&candidates(&scores, 1, 1, 0), 4, 5, Aggregation::Head), [1, 2, 3, 4]);
    }

    #[test]
    fn layers_and_tokens_choose_by_the_mean() {
        let scores = [0.9, 0.0, 0.5, 0.0, 0.8, 0.5, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1];
        assert_eq!(keep(&candidates(&scores, 2, 2, 0), 1, 3, Aggregation::Layer), [2, 2, 2, 2]);
        assert_eq!(keep(&candidates(&scores, 2, 2, 0), 1, 3, Aggregation::Token), [2; 4]);
        assert_eq!(keep(&candidates(&scores, 2, 2, 0), 1, 3, Aggregation::Head), [0, 1, 2, 2]);
    }

    #[test]
    fn nothing_and_everything_may_be_kept() {
        let scores = [0.1, 0.2];
        assert_eq!(keep(&candidates(&scores, 1, 1, 0), 0, 4, Aggregation::Head), [2, 3]);
        assert_eq!(keep(&candidates(&scores, 1, 1, 0), 9, 4, Aggregation::Head), [0, 1, 2, 3]);
    }
}
