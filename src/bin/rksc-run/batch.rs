//! `rksc-run batch`: a file of requests in, a file of answers out, in the order of the requests.
//!
//! ```text
//! lines - admitted while there is room - steps over all their branches - finished - written when all before it are
//! ```
//!
//! An answer depends on its line alone, not on its neighbours: a run that is killed and taken up again ends with the file
//! of one that was not.

mod flight;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::Args as ClapArgs;
use flight::{Flight, Setup, is_of_the_request};
use rksc::Error;
use rksc::engine::{Engine, Event};
use rksc::openai::{Line, Usage, parse_lines, refusal};
use serde_json::Value;

use crate::common::{EngineArgs, print_json, progress};
use crate::decoding::DecodingArgs;
use crate::line_file::LineFile;
use crate::template::TemplateArgs;

/// Lines that wait to be written behind one still in flight, for each that may be in flight.
const WAITING_PER_LINE: usize = 4;

#[derive(ClapArgs)]
pub(crate) struct Args {
    #[command(flatten)]
    engine: EngineArgs,
    /// Requests, one JSON object a line: {"custom_id", "method": "POST", "url", "body"}; url is /v1/chat/completions or
    /// /v1/completions.
    #[arg(short, long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Answers, one JSON object a line, in the order of the requests. A request that cannot be honoured is answered with
    /// the field that is to blame.
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Go on from the lines that --out holds already.
    #[arg(long)]
    resume: bool,
    /// Requests in flight at a time.
    #[arg(long, value_name = "N", default_value_t = 16)]
    concurrency: usize,
    /// Tokens of a choice at most, for chat requests that do not say.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_new_tokens: usize,
    /// Key of the draws of requests without a seed, each of which has its own by its custom_id.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    decoding: DecodingArgs,
    /// One JSON object about the run on stdout.
    #[arg(long)]
    json: bool,
}

/// A line between its admission and the file.
enum Entry {
    Flight(Box<Flight>),
    Answer(Value),
}

/// What a run has done.
#[derive(Default, serde::Serialize)]
struct Totals {
    lines: usize,
    /// Lines that the file held already.
    resumed: usize,
    answered: usize,
    refused: usize,
    usage: Usage,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.concurrency > 0, "--concurrency: must be at least 1");
    let bytes = std::fs::read(&args.input).with_context(|| args.input.display().to_string())?;
    let mut lines = parse_lines(&args.input, &bytes)?;
    let mut totals = Totals { lines: lines.len(), ..Totals::default() };
    let mut config = args.engine.config();
    let decoding = args.decoding.apply(&mut config)?;
    decoding.check_shared("use pin")?;
    let mut engine = decoding.open(config)?;
    let setup = Setup::new(args, &decoding, &engine)?;
    // Last: what is in the file stays there until everything else is known to be sound.
    let mut out = LineFile::open(&args.out, "custom_id", args.resume)?;
    lines.retain(|line| !out.done.contains(&line.custom_id));
    totals.resumed = totals.lines - lines.len();
    let started = Instant::now();
    answer_all(&setup, &mut engine, lines, &mut out, &mut totals).map_err(|e| match e.downcast_ref() {
        Some(Error::Cancelled) => e.context("the answers so far are in the file; --resume goes on from there"),
        _ => e,
    })?;
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let mut report = serde_json::json!({
            "model": engine.info(), "totals": totals, "seconds": seconds, "stats": engine.engine_stats(),
            "counters": engine.counters(),
        });
        decoding.describe(&engine, None, &mut report);
        return print_json(&report);
    }
    let Totals { lines, resumed, answered, refused, usage } = totals;
    eprintln!(
        "{lines} lines: {answered} answered, {refused} refused, {resumed} there before; {} prompt and {} generated tokens in {seconds:.1} s",
        usage.prompt_tokens, usage.completion_tokens
    );
    decoding.say(&engine, None);
    Ok(())
}

fn answer_all(
    setup: &Setup,
    engine: &mut Engine,
    lines: Vec<Line>,
    out: &mut LineFile,
    totals: &mut Totals,
) -> anyhow::Result<()> {
    let bar = progress(lines.len());
    let mut lines = lines.into_iter();
    let mut queue: VecDeque<Entry> = VecDeque::new();
    let concurrency = setup.args.concurrency;
    loop {
        let mut in_flight = queue.iter().filter(|e| matches!(e, Entry::Flight(_))).count();
        while in_flight < concurrency && queue.len() < concurrency * WAITING_PER_LINE {
            let Some(line) = lines.next() else { break };
            let entry = admit(setup, engine, line, totals)?;
            in_flight += usize::from(matches!(entry, Entry::Flight(_)));
            queue.push_back(entry);
        }
        while let Some(Entry::Answer(answer)) = queue.front() {
            out.write(answer)?;
            queue.pop_front();
            bar.inc(1);
        }
        if queue.is_empty() && lines.len() == 0 {
            bar.finish_and_clear();
            return Ok(());
        }
        engine.step()?;
        while let Some(event) = engine.next_event() {
            take(engine, &mut queue, event)?;
        }
        for entry in &mut queue {
            if let Entry::Flight(flight) = entry
                && flight.choices.iter().all(|c| c.finish.is_some())
            {
                let (answer, usage) = setup.land(engine, flight)?;
                totals.answered += 1;
                totals.usage.add(usage);
                *entry = Entry::Answer(answer);
            }
        }
    }
}

/// Hands an event to the choice whose branch it is; one whose request has landed concerns nobody.
fn take(engine: &mut Engine, queue: &mut VecDeque<Entry>, event: Event) -> anyhow::Result<()> {
    let flights = queue.iter_mut().filter_map(|entry| match entry {
        Entry::Flight(flight) => Some(flight),
        Entry::Answer(_) => None,
    });
    let choice = flights.flat_map(|flight| &mut flight.choices).find(|choice| choice.branch == event.branch);
    choice.map_or(Ok(()), |choice| choice.take(engine, event.kind, &mut |_| Ok(())))
}

/// Starts a line's branches, or answers it with why that cannot be. What is no fault of the request ends the run.
fn admit(setup: &Setup, engine: &mut Engine, line: Line, totals: &mut Totals) -> anyhow::Result<Entry> {
    let started = line.request.and_then(|(endpoint, request)| setup.start(engine, &line.custom_id, endpoint, &request));
    match started {
        Ok(flight) => Ok(Entry::Flight(Box::new(flight))),
        Err(error) if is_of_the_request(&error) => {
            totals.refused += 1;
            Ok(Entry::Answer(refusal(&line.custom_id, &error)))
        }
        Err(error) => Err(error.into()),
    }
}
