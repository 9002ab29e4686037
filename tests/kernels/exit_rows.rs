//! `exit_rows` on every device against the rule it stands for: `GateSpec::decide`.

use std::ptr::null;

use rksc::backend::cpu::exit_rows::{Rule as CpuRule, exit_rows};
use rksc::backend::cuda::bindings::*;
use rksc::gate::{Effect, GateSpec, Rows, Rule, Scope, Seen, Statistic};
use rksc::testing::fill::Fill;

use crate::device::{assert_refused, bits, for_each_device};

const LAYER: u32 = 5;

/// Rows of some sequences: who has a say, who has left already, what was seen.
struct Case {
    /// Rows, and whether the gate has a say.
    sequences: Vec<(usize, bool)>,
    similarity: Vec<f32>,
    route: Vec<f32>,
    spec: GateSpec,
}

impl Case {
    fn new(sequences: &[(usize, bool)], statistic: Statistic, rule: Rule, scope: Scope) -> Self {
        let rows = sequences.iter().map(|s| s.0).sum();
        let mut fill = Fill::new(rows as u64);
        let mut similarity: Vec<f32> = (0..rows).map(|_| 0.5 + 0.5 * fill.unit()).collect();
        if rows > 2 {
            similarity[rows / 2] = f32::NAN;
        }
        let route = (0..rows).map(|r| if r % 5 == 4 { 2.0 } else { f32::INFINITY }).collect();
        let spec = GateSpec { layers: vec![LAYER], statistic, rule, scope, effect: Effect::River };
        spec.validate(8).unwrap();
        Self { sequences: sequences.to_vec(), similarity, route, spec }
    }

    fn what(&self) -> String {
        format!("exit_rows {:?} of {:?}", self.spec.rule, self.sequences)
    }

    fn share(&self) -> f32 {
        match self.spec.statistic {
            Statistic::StepSimilarity { of: Rows::Percentile { share, .. } } => share,
            _ => 0.0,
        }
    }

    /// The rows that decide for each row: its sequence's last, or all of them under a percentile.
    fn exits(&self) -> Vec<[u32; 2]> {
        let all = self.share() > 0.0;
        let mut exits = Vec::new();
        for &(rows, has_say) in &self.sequences {
            let (start, end) = (exits.len(), exits.len() + rows);
            let decides = [if all { start } else { end - 1 } as u32, end as u32];
            exits.resize(end, if has_say { decides } else { [0, 0] });
        }
        exits
    }

    /// What the rule's reference says of every row.
    fn want(&self) -> Vec<f32> {
        let exits = self.exits();
        let mut members: Vec<[u32; 2]> = exits.iter().copied().filter(|[start, end]| start < end).collect();
        members.dedup();
        let statistic = |&[start, end]: &[u32; 2]| {
            let mut values = self.similarity[start as usize..end as usize].to_vec();
            // A NaN counts among the lowest.
            values.sort_by(|a, b| a.partial_cmp(b).unwrap_or_else(|| b.is_nan().cmp(&a.is_nan())));
            [values[(self.share() * values.len() as f32) as usize]]
        };
        let values: Vec<[f32; 1]> = members.iter().map(statistic).collect();
        let seen: Vec<Seen<'_>> = members.iter().zip(&values).map(|(m, v)| Seen { row: m[1] - 1, values: v }).collect();
        let fired = self.spec.decide(&seen);
        let fires = |decide: &[u32; 2]| members.iter().position(|m| m == decide).is_some_and(|m| fired[m]);
        let left = |(route, decide): (&f32, &[u32; 2])| match route.is_infinite() && fires(decide) {
            true => LAYER as f32,
            false => *route,
        };
        self.route.iter().zip(&exits).map(left).collect()
    }

    fn check(&self) {
        let (what, exits, want) = (self.what(), self.exits(), self.want());
        let rule = match self.spec.rule {
            Rule::EveryNth { every, offset } => CpuRule::EveryNth { every, offset },
            Rule::Above(tau) => CpuRule::Above { similarity: &self.similarity, tau, share: self.share() },
            _ => unreachable!(),
        };
        let mut route = self.route.clone();
        exit_rows(&exits, &rule, self.spec.scope, LAYER, &mut route).unwrap();
        assert_eq!(route, want, "{what} on the CPU");
        for_each_device(&what, |dev| {
            let (exits, similarity) = (dev.buffer(exits.as_flattened())?, dev.buffer(&self.similarity)?);
            let mut route = dev.buffer(&self.route)?;
            let params = rksc_exit_rows_params {
                exits: exits.ptr(),
                similarity: similarity.ptr(),
                whole_batch: u32::from(self.spec.scope == Scope::Batch),
                ..params(self.route.len(), route.ptr_mut())
            };
            let params = match self.spec.rule {
                Rule::EveryNth { every, offset } => {
                    rksc_exit_rows_params { rule: RKSC_EXIT_EVERY_NTH, every, offset, ..params }
                }
                Rule::Above(tau) => rksc_exit_rows_params { tau, share: self.share(), ..params },
                _ => unreachable!(),
            };
            dev.launch(dev.kernels().exit_rows, &params)?;
            let route = dev.to_vec(&route)?;
            assert_eq!(route, want, "{what}");
            Ok(bits(&route))
        });
    }
}

fn params(rows: usize, route: *mut f32) -> rksc_exit_rows_params {
    rksc_exit_rows_params {
        exits: null(),
        similarity: null(),
        route,
        num_rows: rows as u32,
        rule: RKSC_EXIT_ABOVE,
        every: 0,
        offset: 0,
        tau: 0.0,
        share: 0.0,
        whole_batch: 0,
        layer: LAYER,
    }
}

const LAST: Statistic = Statistic::StepSimilarity { of: Rows::Last };
const PERCENTILE: Statistic = Statistic::StepSimilarity { of: Rows::Percentile { share: 0.2, skip: 0 } };

#[test]
fn rows_leave_as_the_rule_says() {
    let mixed = [(1, true), (1, true), (7, false), (1, true), (12, true), (1, false), (40, true)];
    let many = [(1, true); 700];
    for sequences in [&mixed[..], &many[..], &[(1, true)]] {
        for scope in [Scope::Sequence, Scope::Batch] {
            for tau in [-1.0, 0.55, 0.7, 2.0] {
                Case::new(sequences, LAST, Rule::Above(tau), scope).check();
                Case::new(sequences, PERCENTILE, Rule::Above(tau), scope).check();
            }
            for (every, offset) in [(1, 0), (3, 1), (2, 4000)] {
                Case::new(sequences, Statistic::RowIndex, Rule::EveryNth { every, offset }, scope).check();
            }
        }
    }
}

/// Acceptance vectors RV2 and RV3.
#[test]
fn rv2_rv3_a_batch_leaves_with_its_last_row_and_the_bound_is_strict() {
    let rows = [[0.31, 0.28], [0.62, 0.55], [0.48, 0.71], [0.91, 0.93]];
    let leave = |tau: f32, scope: Scope| {
        let mut route = [f32::INFINITY; 2];
        for (i, similarity) in rows.iter().enumerate() {
            let rule = CpuRule::Above { similarity, tau, share: 0.0 };
            exit_rows(&[[0, 1], [1, 2]], &rule, scope, i as u32 + 1, &mut route).unwrap();
        }
        route
    };
    assert_eq!(leave(0.5, Scope::Batch), [2.0, 2.0]);
    assert_eq!(leave(0.5, Scope::Sequence), [2.0, 2.0]);
    assert_eq!(leave(0.7, Scope::Batch), [4.0, 4.0]);
    assert_eq!(leave(0.7, Scope::Sequence), [4.0, 3.0]);
    assert_eq!(leave(0.95, Scope::Sequence), [f32::INFINITY; 2]);
    assert_eq!(leave(0.93, Scope::Sequence), [f32::INFINITY; 2]);
}

#[test]
fn rows_enter_the_backbone_and_nonsense_is_refused() {
    for_each_device("enter", |dev| {
        let mut route = dev.buffer(&[3.0f32; 300])?;
        let enter = rksc_exit_rows_params { rule: RKSC_EXIT_ENTER, ..params(299, route.ptr_mut()) };
        dev.launch(dev.kernels().exit_rows, &enter)?;
        let found = dev.to_vec(&route)?;
        assert!(found[..299].iter().all(|r| r.is_infinite()) && found[299] == 3.0);
        let exits = dev.buffer(&[0u32, 1])?;
        let good = rksc_exit_rows_params { exits: exits.ptr(), ..params(1, route.ptr_mut()) };
        for bad in [
            rksc_exit_rows_params { rule: 3, ..good },
            rksc_exit_rows_params { rule: RKSC_EXIT_EVERY_NTH, every: 0, ..good },
            rksc_exit_rows_params { exits: null(), ..good },
            good,
        ] {
            assert_refused(dev.launch(dev.kernels().exit_rows, &bad));
        }
        Ok(bits(&found))
    });
    let rule = CpuRule::Above { similarity: &[0.0], tau: 0.0, share: 0.0 };
    assert!(exit_rows(&[[0, 1], [1, 2]], &rule, Scope::Sequence, 1, &mut [0.0; 2]).is_err());
    assert!(exit_rows(&[[0, 3]], &rule, Scope::Sequence, 1, &mut [0.0]).is_err());
}
