//! `adit manifest`: what would be installed, as YAML.

use std::io::Write as _;

use anyhow::Context as _;

use super::options::SpecArgs;
use super::spec::PROFILES;
use super::template::to_yaml;
use crate::output::{Outcome, Output};

/// Print the objects of an installation without touching a cluster
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Generate(Generate),
    /// List the profiles and what each installs
    Profiles,
}

/// Print the manifests of every component
///
/// The output depends on the arguments alone: no cluster is asked, and nothing in it is
/// random.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  adit manifest generate --set profile=ambient > mesh.yaml
  adit manifest generate -f operator.yaml --set values.global.hub=registry.example/adit")]
struct Generate {
    #[command(flatten)]
    spec: SpecArgs,
}

pub fn run(args: Args, out: &mut Output) -> anyhow::Result<Outcome> {
    let text = match args.command {
        Command::Generate(args) => {
            let mut text = String::new();
            for object in super::objects(&args.spec.read()?)?
                .iter()
                .flat_map(|(_, list)| list)
            {
                text += "---\n";
                text += &to_yaml(&object.manifest);
                text.push('\n');
            }
            text
        }
        Command::Profiles => {
            let mut table = crate::table::Table::new(["PROFILE", "COMPONENTS"]);
            for (name, components) in PROFILES {
                let keys: Vec<_> = components.iter().map(|c| c.key()).collect();
                let keys = match keys.is_empty() {
                    true => "none".to_owned(),
                    false => keys.join(", "),
                };
                table.row([name, &keys]);
            }
            table.render()
        }
    };
    out.write_all(text.as_bytes())
        .context("cannot write the output")?;
    Ok(Outcome::Well)
}
