//! `rksc-run`: the engine on the command line. Data goes to stdout, everything else to stderr.

/// A line on stdout; a reader that has gone away is an error, not a panic.
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stdout(), $($arg)*)?
    }};
}

mod batch;
mod bench;
mod calibrate;
mod calibration;
mod chat;
mod choice;
mod common;
mod decoding;
mod gates;
mod generate;
mod inspect;
mod kv;
mod line_file;
mod plan;
mod quant;
mod quantise;
mod report_file;
mod river;
mod score;
mod search;
mod solve;
mod template;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

/// A transformer inference engine for multi-branch reasoning: one problem, many branches, one verified answer.
#[derive(Parser)]
#[command(name = "rksc-run", version)]
struct Cli {
    /// More log lines on stderr (-v: info, -vv: debug).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Solve problems with many branches each; with nothing given, the bundled model solves bundled problems.
    Solve(Box<solve::Args>),
    /// Find thresholds that hold a target, for `solve` to take.
    Calibrate(Box<calibrate::Args>),
    /// Continue a prompt.
    Generate(Box<generate::Args>),
    /// Talk with a chat model; the KV of the conversation stays from turn to turn.
    Chat(Box<chat::Args>),
    /// What a model's chat template makes of messages.
    Template(template::Args),
    /// Answer a file of requests in OpenAI's batch format.
    Batch(Box<batch::Args>),
    /// Log-probabilities of given texts or token ids.
    Score(score::Args),
    /// What a model folder holds.
    Inspect(inspect::Args),
    /// What a model needs in memory, before it is loaded.
    Plan(plan::Args),
    /// Make a model's 4-bit codes ahead of time, for --river and --quantise.
    Quantise(Box<quantise::Args>),
    /// The devices this build can use here.
    Devices(common::JsonFlag),
    /// Measure: policies against each other, kernels, whole passes.
    #[command(subcommand)]
    Bench(bench::Command),
    /// A completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors; anything else is the user's.
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    common::init_log(cli.verbose);
    // A panic has printed itself; its exit status is that of a bug.
    std::panic::catch_unwind(|| common::exit(run(cli.command)))
        .unwrap_or_else(|_| ExitCode::from(rksc::ErrorCode::Internal as u8))
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Solve(args) => solve::run(&args),
        Command::Calibrate(args) => calibrate::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Template(args) => template::run(&args),
        Command::Batch(args) => batch::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Quantise(args) => quantise::run(&args),
        Command::Devices(args) => inspect::devices(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "rksc-run", &mut script);
            Ok(std::io::stdout().write_all(&script)?)
        }
    }
}
