//! `rksc-run`: the engine on the command line. Data goes to stdout, everything else to stderr.

mod bench;
mod common;
mod generate;
mod inspect;
mod plan;
mod score;
mod solve;

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
    /// Continue a prompt.
    Generate(Box<generate::Args>),
    /// Log-probabilities of given texts or token ids.
    Score(score::Args),
    /// What a model folder holds.
    Inspect(inspect::Args),
    /// What a model needs in memory, before it is loaded.
    Plan(plan::Args),
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
    let result = match cli.command {
        Command::Solve(args) => solve::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Score(args) => score::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Devices(args) => inspect::devices(&args),
        Command::Bench(command) => bench::run(&command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "rksc-run", &mut std::io::stdout());
            Ok(())
        }
    };
    common::exit(result)
}
