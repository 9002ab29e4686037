//! A random walk of branches: roots, forks, budgets, steps back, deaths, and who gives up its blocks meanwhile. Two walks of
//! one seed ask for the same, so that what they get can be compared.

use rksc::backend::RkvVariant;
use rksc::engine::{BranchId, Engine, EventKind, PrefillOptions};
use rksc::kv::budget::{Aggregation, KeepRule, KvBudget};

use super::{Rng, fork, greedy, row_bits};

pub(crate) const RULES: [KeepRule; 7] = [
    KeepRule::RKV,
    KeepRule::RKv { variant: RkvVariant::Text, lambda: 0.1, threshold: 0.5, pool_size: 7 },
    KeepRule::RKv { variant: RkvVariant::Alg1, lambda: 0.1, threshold: 0.5, pool_size: 7 },
    KeepRule::SNAPKV,
    KeepRule::H2o,
    KeepRule::Streaming,
    KeepRule::Random { seed: 7 },
];

/// Every set of positions a branch holds.
pub(crate) fn positions(e: &Engine, id: BranchId) -> Vec<Vec<u32>> {
    let heads = (0..e.model().num_layers).flat_map(|l| (0..e.model().num_kv_heads).map(move |h| (l, h)));
    heads.map(|(l, h)| e.kv_positions(id, l, h).unwrap()).collect()
}

/// What happens to the branches of a walk, and when: the same for every run of one seed.
pub(crate) struct Walk {
    /// Branches may have KV budgets.
    budgets: bool,
    rng: Rng,
    /// Who gives up its blocks, if anybody does.
    preempt: Option<Rng>,
    alive: Vec<(BranchId, usize)>,
    /// By branch, in order of birth: every row.
    pub(crate) rows: Vec<Vec<Vec<u32>>>,
    /// Positions at death or at the end.
    pub(crate) held: Vec<Vec<Vec<u32>>>,
    /// Neither it nor any ancestor has a budget.
    pub(crate) is_exact: Vec<bool>,
    /// Its last row is of tokens that are gone.
    pub(crate) is_stale: Vec<bool>,
    pub(crate) tokens: Vec<Vec<u32>>,
    /// Parent, tokens at birth, own budget.
    pub(crate) born: Vec<(Option<usize>, usize, Option<KvBudget>)>,
}

impl Walk {
    pub(crate) fn new(seed: u64, preempt: bool) -> Self {
        Self {
            budgets: true,
            rng: Rng(seed),
            preempt: preempt.then_some(Rng(!seed)),
            alive: Vec::new(),
            rows: Vec::new(),
            held: Vec::new(),
            is_exact: Vec::new(),
            is_stale: Vec::new(),
            tokens: Vec::new(),
            born: Vec::new(),
        }
    }

    /// Nobody has a budget.
    pub(crate) fn without_budgets(self) -> Self {
        Self { budgets: false, ..self }
    }

    fn enter(&mut self, id: BranchId, is_exact: bool) {
        self.alive.push((id, self.rows.len()));
        self.rows.push(Vec::new());
        self.held.push(Vec::new());
        self.tokens.push(Vec::new());
        self.is_exact.push(is_exact);
        self.is_stale.push(false);
    }

    /// Goes back some tokens, where no cut went through them, and on from there.
    fn go_back(&mut self, e: &mut Engine) {
        let (id, number) = self.alive[self.rng.below(self.alive.len())];
        let len = e.tokens(id).unwrap().len();
        let back = 1 + self.rng.below(12);
        if e.truncate(id, len.saturating_sub(back).max(1)).is_ok() {
            // Where the cut ended just there, its last row cannot run again, and it stays idle.
            let new = 10 + self.rng.below(80);
            let _ = e.start(id, greedy(new));
            self.is_stale[number] = true;
        }
    }

    /// A branch gets another budget, or its first, in the middle of its life.
    fn limit_late(&mut self, e: &mut Engine) {
        let (id, number) = self.alive[self.rng.below(self.alive.len())];
        if e.stats(id).unwrap().kv_cuts == 0 && self.try_limit(e, id).is_ok() {
            self.is_exact[number] = false;
        }
    }

    fn limit(&mut self, e: &mut Engine, id: BranchId) -> KvBudget {
        self.try_limit(e, id).unwrap()
    }

    fn try_limit(&mut self, e: &mut Engine, id: BranchId) -> rksc::Result<KvBudget> {
        let len = e.tokens(id).unwrap().len();
        let rule = RULES[self.rng.below(RULES.len())];
        let pinned = [0, 4, len, len][self.rng.below(4)];
        let aggregation = [Aggregation::Head, Aggregation::Head, Aggregation::Layer, Aggregation::Token];
        let aggregation = aggregation[self.rng.below(4)];
        let budget = 9 + self.rng.below(30);
        let buffer = 1 + self.rng.below(24);
        let budget = KvBudget { budget, buffer, pinned, rule, aggregation };
        e.limit_kv(id, budget).map(|()| budget)
    }

    fn root(&mut self, e: &mut Engine) {
        let len = 1 + self.rng.below(60);
        let (tokens, path) = (self.rng.tokens(len), self.rows.len() as u64);
        let id = e.prefill(&tokens, PrefillOptions { path, ..PrefillOptions::default() }).unwrap();
        let budget = (self.rng.below(2) > 0 && self.budgets).then(|| self.limit(e, id));
        self.start(e, id);
        self.enter(id, budget.is_none());
        self.born.push((None, len, budget));
    }

    fn start(&mut self, e: &mut Engine, id: BranchId) {
        let new = 10 + self.rng.below(80);
        e.start(id, greedy(new)).unwrap();
    }

    fn fork(&mut self, e: &mut Engine) {
        let (parent, number) = self.alive[self.rng.below(self.alive.len())];
        let child = fork(e, parent);
        let (mut is_exact, len) = (self.is_exact[number], e.tokens(parent).unwrap().len());
        let mut budget = None;
        if self.rng.below(2) == 0 {
            let tokens = 1 + self.rng.below(5);
            let tokens = self.rng.tokens(tokens);
            e.append(child, &tokens).unwrap();
        }
        if is_exact && self.rng.below(2) == 0 && self.budgets {
            is_exact = false;
            budget = Some(self.limit(e, child));
        }
        self.start(e, child);
        self.enter(child, is_exact);
        self.born.push((Some(number), len, budget));
    }

    fn leave(&mut self, e: &mut Engine, place: usize) {
        let (id, number) = self.alive.swap_remove(place);
        self.held[number] = positions(e, id);
        self.tokens[number] = e.tokens(id).unwrap().to_vec();
        e.prune(id).unwrap();
    }

    fn step(&mut self, e: &mut Engine) {
        match self.rng.below(12) {
            0 if self.alive.len() < 14 => self.root(e),
            1..4 if !self.alive.is_empty() && self.alive.len() < 14 => self.fork(e),
            4 if self.alive.len() > 6 => {
                let place = self.rng.below(self.alive.len());
                self.leave(e, place);
            }
            5 if !self.alive.is_empty() => {
                let (id, _) = self.alive[self.rng.below(self.alive.len())];
                e.stop(id).unwrap();
            }
            6 if !self.alive.is_empty() => self.go_back(e),
            7 if !self.alive.is_empty() && self.rng.below(2) == 0 && self.budgets => self.limit_late(e),
            _ => {}
        }
        if let Some(rng) = &mut self.preempt {
            for &(id, _) in &self.alive {
                if rng.below(7) == 0 {
                    e.force_preemption(id);
                }
            }
        }
        e.step().unwrap();
        e.check_integrity().unwrap();
        while let Some(event) = e.next_event() {
            if let (EventKind::Token(_) | EventKind::Ready, Some((id, number))) =
                (&event.kind, self.alive.iter().find(|a| a.0 == event.branch))
            {
                self.is_stale[*number] = false;
                self.rows[*number].push(row_bits(e, *id));
            }
        }
    }

    pub(crate) fn run(mut self, e: &mut Engine) -> Self {
        self.root(e);
        for _ in 0..220 {
            self.step(e);
        }
        while !self.alive.is_empty() {
            self.leave(e, 0);
        }
        e.clear_prefix_cache().unwrap();
        e.check_integrity().unwrap();
        assert_eq!(e.engine_stats().blocks_used, 0);
        self
    }

    /// Whoever gave up blocks in this walk and not in `other`: every branch has said and held the same in both.
    pub(crate) fn assert_same(&self, other: &Self, seed: u64) {
        for i in 0..other.rows.len() {
            let differs = self.rows[i].iter().zip(&other.rows[i]).position(|(a, b)| a != b);
            assert_eq!(differs, None, "seed {seed}, branch {i} of {:?}: first row that differs", other.born[i]);
            assert_eq!(self.rows[i].len(), other.rows[i].len(), "seed {seed}, branch {i}: rows");
            assert_eq!(self.tokens[i], other.tokens[i], "seed {seed}, branch {i}: tokens");
            // An exact branch that has given up its blocks holds nothing, until it is asked for something.
            if self.held[i].iter().any(|set| !set.is_empty()) {
                assert!(self.held[i] == other.held[i], "seed {seed}, branch {i}: positions");
            }
        }
    }
}
