//! The host's packages. A conflict is reported and nothing is ever removed.

use std::time::Duration;

use nix::unistd::Uid;

use crate::command::Cmd;
use crate::failure::{Failure, Result};
use crate::report::{line, step};
use crate::workspace::which;

/// A program that the commands need and the Debian package that brings it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
}

/// Everything that the set-up provides. A test that is skipped for want of one of these is a failure under `CI=true`.
pub(crate) const PROVIDED: [Program; 6] = [
    Program { name: "qemu-system-x86_64", package: "qemu-system-x86" },
    Program { name: "qemu-img", package: "qemu-utils" },
    Program { name: "qemu-storage-daemon", package: "qemu-utils" },
    Program { name: "e2fsck", package: "e2fsprogs" },
    Program { name: "ip", package: "iproute2" },
    Program { name: "nft", package: "nftables" },
];

impl Program {
    /// Whether `text` names this program or its package.
    pub(crate) fn is_named_in(&self, text: &str) -> bool {
        text.contains(self.name) || text.contains(self.package)
    }
}

/// Installs what is missing: as root on Debian; else tells the one command that would.
pub(crate) fn install(offline: bool) -> Result<()> {
    let missing = missing(&|program| which(program).is_some());
    if missing.is_empty() {
        line("packages: nothing is missing");
        return Ok(());
    }
    line(&format!("packages: missing {}", missing.join(" ")));
    if offline || !Uid::effective().is_root() || which("apt-get").is_none() {
        return Err(by_hand(&missing));
    }
    step("apt-get update", || apt(&["update"]).map(drop))?;
    let wanted = plan(&missing)?;
    step(&format!("apt-get install {}", wanted.join(" ")), || apt(&install_args(&wanted, false)).map(drop))
}

/// Says how to get `clippy` and `rustfmt` where they are missing: the toolchain is the user's.
pub(crate) fn check_cargo_components() -> Result<()> {
    for component in ["clippy", "fmt"] {
        let version = Cmd::new(crate::workspace::cargo()).args([component, "--version"]).finish()?;
        if !version.status.success() {
            line(&format!(
                "cargo {component}: missing; `cargo xtask ci` needs it: rustup component add clippy rustfmt"
            ));
        }
    }
    Ok(())
}

/// The packages to install, each once, in the table's order.
fn missing(have: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
    let mut packages: Vec<&str> = PROVIDED.iter().filter(|p| !have(p.name)).map(|p| p.package).collect();
    packages.dedup();
    packages
}

fn by_hand(missing: &[&str]) -> Failure {
    let command = format!("apt-get update && apt-get {}", install_args(missing, false).join(" "));
    Failure::new(format!("packages are missing: {}", missing.join(" ")))
        .remedy(format!("as root, run: {command}"))
}

/// Tries the installation on paper. A `qemu-utils` of another release than the emulator's blocks it; then the release that
/// fits is asked for in the same call, which replaces that package and removes none.
fn plan(missing: &[&'static str]) -> Result<Vec<String>> {
    let plain: Vec<String> = missing.iter().map(|&p| p.to_owned()).collect();
    let Err(conflict) = simulate(&plain) else { return Ok(plain) };
    if !missing.contains(&"qemu-system-x86") {
        return Err(conflict);
    }
    let version = candidate("qemu-system-x86")?;
    let pinned: Vec<String> =
        plain.into_iter().filter(|p| p != "qemu-utils").chain([format!("qemu-utils={version}")]).collect();
    simulate(&pinned).map_err(|_| conflict)?;
    line(&format!(
        "packages: qemu-utils is replaced by {version}, the emulator's own release; nothing is removed"
    ));
    Ok(pinned)
}

fn simulate(packages: &[String]) -> Result<String> {
    apt(&install_args(packages, true)).map_err(|failure| {
        Failure::new(format!(
            "apt-get cannot install {} without removing something\n{}",
            packages.join(" "),
            failure.what()
        ))
        .remedy("resolve the conflict by hand; this command removes nothing")
    })
}

fn install_args<P: AsRef<str>>(packages: &[P], simulate: bool) -> Vec<String> {
    let mut args: Vec<String> =
        ["install", "-y", "--no-remove", "--no-install-recommends"].map(str::to_owned).to_vec();
    if packages.iter().any(|p| p.as_ref().contains('=')) {
        args.push("--allow-downgrades".to_owned());
    }
    if simulate {
        args.push("--simulate".to_owned());
    }
    args.extend(packages.iter().map(|p| p.as_ref().to_owned()));
    args
}

/// The version that the archive would install, not the one that is installed.
fn candidate(package: &str) -> Result<String> {
    let policy = Cmd::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").output()?;
    parse_candidate(&policy).ok_or_else(|| {
        Failure::new(format!("the package archive has no {package}"))
            .remedy("check the sources of apt, then run apt-get update")
    })
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|l| l.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn apt<A: AsRef<str>>(args: &[A]) -> Result<String> {
    Cmd::new("apt-get")
        .args(["-o", "DPkg::Lock::Timeout=120"])
        .args(args.iter().map(AsRef::as_ref))
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .limit(APT_LIMIT)
        .output()
}

const APT_LIMIT: Duration = Duration::from_secs(15 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_machine_misses_each_package_once() {
        assert_eq!(
            missing(&|_| false),
            ["qemu-system-x86", "qemu-utils", "e2fsprogs", "iproute2", "nftables"]
        );
        assert_eq!(missing(&|program| program != "nft"), ["nftables"]);
        assert!(missing(&|_| true).is_empty());
    }

    #[test]
    fn an_ordinary_user_is_told_the_one_command() {
        let told = by_hand(&["nftables"]).to_string();
        assert!(
            told.contains(
                "apt-get update && apt-get install -y --no-remove --no-install-recommends nftables"
            ),
            "{told}"
        );
    }

    #[test]
    fn nothing_is_ever_removed_and_only_a_pinned_release_may_go_back() {
        let plain = install_args(&["qemu-utils"], false);
        assert!(plain.contains(&"--no-remove".to_owned()));
        assert!(!plain.contains(&"--allow-downgrades".to_owned()));
        let pinned = install_args(&["qemu-utils=1:7.2"], true);
        assert!(
            pinned.contains(&"--no-remove".to_owned()) && pinned.contains(&"--allow-downgrades".to_owned())
        );
    }

    #[test]
    fn the_candidate_is_read_and_none_is_no_version() {
        assert_eq!(
            parse_candidate("x:\n  Installed: 1\n  Candidate: 1:7.2+dfsg-7\n"),
            Some("1:7.2+dfsg-7".to_owned())
        );
        assert_eq!(parse_candidate("x:\n  Candidate: (none)\n"), None);
    }
}
