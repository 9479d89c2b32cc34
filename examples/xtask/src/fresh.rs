//! `cargo xtask fresh-check`: does it work on a machine that has nothing but Rust, git and a C compiler?
//!
//! Makes a Debian 12 root in `target/fresh/`, clones HEAD into it and runs both commands of the README there as root, then the
//! tests once more as an ordinary user who has neither `/dev/kvm` nor `/dev/net/tun`. The Rust toolchain of this machine is
//! mounted read-only. All mounts and processes live in namespaces of their own and end with the check.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Uid;

use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::report::{line, step};
use crate::workspace::{root, which};

/// Who runs a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Root,
    /// Without rights, and without the devices that a virtual machine or a network may want.
    User,
}

/// Runs the check: all of `commands` as root, or when there is none those of the README, the tests also as a user.
pub(crate) fn run(commands: &[String]) -> Result<()> {
    if !Uid::effective().is_root() {
        return Err(Failure::new("a chroot needs root").remedy("run `cargo xtask fresh-check` as root"));
    }
    tools()?;
    let fresh = root().join("target/fresh");
    let debian = fresh.join("debian");
    base(&fresh)?;
    let instance = fresh.join("root");
    let _ = fs::remove_dir_all(&instance);
    step("fresh-check: copy the root", || {
        Cmd::new("cp").arg("-a").arg(&debian).arg(&instance).limit(COPY_LIMIT).output()
    })?;
    clone(&instance)?;
    let toolchain = toolchain()?;
    let given: Vec<(&str, Who)> = commands.iter().map(|command| (command.as_str(), Who::Root)).collect();
    let wanted = if given.is_empty() { &README[..] } else { &given[..] };
    let outcome = wanted.iter().try_for_each(|(command, who)| inside(&instance, &toolchain, command, *who));
    if outcome.is_ok() {
        fs::remove_dir_all(&instance).at(&instance)?;
        line("FRESH-CHECK OK");
    }
    outcome
}

/// The programs that make a Debian root.
fn tools() -> Result<()> {
    if which("mmdebstrap").is_some() && which("gpgv").is_some() {
        return Ok(());
    }
    let install =
        ["install", "-y", "--no-remove", "--no-install-recommends", "mmdebstrap", "gpgv", "arch-test"];
    step("fresh-check: install mmdebstrap", || {
        Cmd::new("apt-get").arg("update").limit(APT_LIMIT).output()?;
        Cmd::new("apt-get").args(install).env("DEBIAN_FRONTEND", "noninteractive").limit(APT_LIMIT).output()
    })
    .map(drop)
}

/// A root with git and a C compiler, made once.
fn base(fresh: &Path) -> Result<()> {
    let debian = fresh.join("debian");
    if debian.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(fresh).at(fresh)?;
    let half = fresh.join("debian.half");
    let _ = fs::remove_dir_all(&half);
    let make = Cmd::new("mmdebstrap")
        .args(["--variant=apt", "--mode=root", "--aptopt=APT::Sandbox::User \"root\""])
        .args(["--include=ca-certificates,git,gcc,libc6-dev", "bookworm"])
        .arg(&half)
        .limit(APT_LIMIT);
    step("fresh-check: make a Debian 12 root", || make.output())?;
    fs::rename(&half, &debian).at(&debian)
}

/// Puts HEAD, and nothing that is not committed, into the root.
fn clone(instance: &Path) -> Result<()> {
    let source = instance.join("src/iaas");
    fs::create_dir_all(source.parent().unwrap_or(instance)).at(&source)?;
    let clone =
        Cmd::new("git").args(["clone", "--quiet", "--no-hardlinks", "--no-tags"]).arg(root()).arg(&source);
    step("fresh-check: clone HEAD", || clone.limit(COPY_LIMIT).output())?;
    let head = Cmd::new("git").args(["rev-parse", "HEAD"]).dir(&root()).output()?;
    Cmd::new("git").args(["checkout", "--quiet", "--detach", head.trim()]).dir(&source).output().map(drop)
}

/// Where `bin/cargo` and `bin/rustc` are.
fn toolchain() -> Result<PathBuf> {
    let sysroot = Cmd::new("rustc").args(["--print", "sysroot"]).dir(&root()).output()?;
    let sysroot = PathBuf::from(sysroot.trim());
    match sysroot.join("bin/cargo").is_file() {
        true => Ok(sysroot),
        false => {
            Err(Failure::new(format!("{} holds no cargo", sysroot.display()))
                .remedy("use a toolchain of rustup"))
        }
    }
}

/// Runs one command line in the root, under namespaces that end with it.
fn inside(instance: &Path, toolchain: &Path, command: &str, who: Who) -> Result<()> {
    let shown = match who {
        Who::Root => command.to_owned(),
        Who::User => format!("{command} (as an ordinary user)"),
    };
    line(&format!("fresh-check: {shown}"));
    let script = script(instance, toolchain, command, who);
    let run = Cmd::new("unshare")
        .args(["--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private"])
        .args(["sh", "-euc", &script])
        .limit(RUN_LIMIT);
    run.run().map_err(|failure| {
        Failure::new(format!(
            "`{shown}` on a fresh Debian 12: {}",
            failure.what().rsplit(": ").next().unwrap_or_default()
        ))
        .remedy(format!("its root is kept in {}", instance.display()))
    })
}

fn script(instance: &Path, toolchain: &Path, command: &str, who: Who) -> String {
    let (root, toolchain) = (quoted(&instance.to_string_lossy()), quoted(&toolchain.to_string_lossy()));
    let config = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .map(|home| quoted(&home.join("config.toml").to_string_lossy()))
        .unwrap_or_default();
    let passed: String = PASSED
        .iter()
        .filter_map(|name| Some(format!(" {name}={}", quoted(&std::env::var(name).ok()?))))
        .collect();
    let (home, user, prepare) = match who {
        Who::Root => ("/root", "", ""),
        Who::User => ("/home/user", "--userspec=1000:1000 --groups= ", FOR_USER),
    };
    format!(
        "root={root}
mount -t proc proc \"$root/proc\"
mount --rbind /sys \"$root/sys\"
mount --rbind /dev \"$root/dev\"
mkdir -p \"$root/opt/rust\" \"$root/src/cargo\" \"$root/home/user\"
mount --bind {toolchain} \"$root/opt/rust\"
mount -o remount,bind,ro \"$root/opt/rust\"
test ! -e {CERTIFICATES} || cp -L {CERTIFICATES} \"$root{CERTIFICATES}\"
cp -L /etc/resolv.conf /etc/hosts \"$root/etc/\"
test ! -e {config} || cp {config} \"$root/src/cargo/config.toml\"
{prepare}exec env -i HOME={home} CARGO_HOME=/src/cargo TERM=dumb LANG=C.UTF-8 CARGO_TERM_COLOR=never \\
    PATH=/opt/rust/bin:/usr/sbin:/usr/bin:/sbin:/bin{passed} chroot {user}\"$root\" sh -euc {}",
        quoted(&format!("cd /src/iaas; {command}"))
    )
}

/// `text` as one word of a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

const README: [(&str, Who); 3] =
    [("cargo xtask quickstart", Who::Root), ("cargo xtask test", Who::Root), ("cargo xtask test", Who::User)];
/// Everything that was built is the user's, and the devices are nobody's.
const FOR_USER: &str = "chown -R 1000:1000 \"$root/src\" \"$root/home/user\"
touch \"$root/src/nothing\"
chmod 000 \"$root/src/nothing\"
for device in kvm net/tun; do
    test ! -e \"$root/dev/$device\" || mount --bind \"$root/src/nothing\" \"$root/dev/$device\"
done
";
/// A proxy may have an authority of its own.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";
/// How this machine reaches the outside.
const PASSED: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "CARGO_HTTP_CAINFO",
];
const APT_LIMIT: Duration = Duration::from_secs(15 * 60);
const COPY_LIMIT: Duration = Duration::from_secs(5 * 60);
const RUN_LIMIT: Duration = Duration::from_secs(60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_reaches_the_shell_inside_as_it_was_given() {
        assert_eq!(quoted("it's"), "'it'\\''s'");
        let script = |who| script(Path::new("/fresh root"), Path::new("/rust"), "echo 'a b'", who);
        let user = script(Who::User);
        assert!(user.contains("/dev/$device") && user.contains("chroot --userspec=1000:1000"), "{user}");
        let script = script(Who::Root);
        assert!(!script.contains("userspec") && !script.contains("nothing"), "{script}");
        assert!(script.starts_with("root='/fresh root'\n"), "{script}");
        assert!(script.ends_with("sh -euc 'cd /src/iaas; echo '\\''a b'\\'''"), "{script}");
        assert!(
            script.contains("mount -o remount,bind,ro \"$root/opt/rust\""),
            "the toolchain cannot be changed"
        );
    }
}
