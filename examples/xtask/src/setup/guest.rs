//! The guest's parts: fetched once from the package archive, kept in `target/guest/cache/`, packed when a part has changed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use super::{Options, initrd};
use crate::command::Cmd;
use crate::failure::{Context, Failure, Result};
use crate::report::{line, step};
use crate::workspace::{cargo, guest_dir, root};

/// What a virtual machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    /// A bzImage.
    pub(crate) kernel: PathBuf,
    /// An initramfs that understands `guest.run=`.
    pub(crate) initrd: PathBuf,
}

/// What guests are made of, unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Packages {
    /// The kernel package: `boot/` and `lib/modules/`.
    pub(crate) kernel: PathBuf,
    /// A statically linked busybox.
    pub(crate) busybox: PathBuf,
}

/// Fetches and unpacks what is missing.
pub(super) fn packages(options: &Options) -> Result<Packages> {
    let cache = guest_dir().join("cache");
    fs::create_dir_all(&cache).at(&cache)?;
    let kernel = unpacked(&cache, "linux-image-", options)?;
    let busybox = unpacked(&cache, "busybox-static", options)?.join("bin/busybox");
    Ok(Packages { kernel, busybox })
}

/// Makes what is missing and returns the paths.
pub(super) fn provide(options: &Options) -> Result<Guest> {
    let dir = guest_dir();
    let own = Guest { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd.cpio.gz") };
    if let (Some(kernel), Some(initrd)) = (&options.kernel, &options.initrd) {
        return Ok(Guest { kernel: kernel.clone(), initrd: initrd.clone() });
    }
    fs::create_dir_all(&dir).at(&dir)?;
    let _one_at_a_time = lock(&dir)?;
    make(&dir, options)?;
    Ok(Guest {
        kernel: options.kernel.clone().unwrap_or(own.kernel),
        initrd: options.initrd.clone().unwrap_or(own.initrd),
    })
}

fn make(dir: &Path, options: &Options) -> Result<()> {
    let Packages { kernel, busybox } = packages(options)?;
    let tool = guest_tool(dir)?;
    let parts = initrd::Parts { kernel: &kernel, busybox: &busybox, tool: &tool };
    let stamp = parts.stamp()?;
    if !options.refresh
        && fs::read_to_string(dir.join("stamp")).is_ok_and(|old| old == stamp)
        && complete(dir)
    {
        line("guest: up to date");
        return Ok(());
    }
    step("guest: pack kernel and initramfs", || pack(dir, &parts))?;
    fs::write(dir.join("stamp"), stamp).at(dir)
}

/// Waits for another set-up of the same folder. The lock ends with its holder.
fn lock(dir: &Path) -> Result<Flock<File>> {
    let path = dir.join("lock");
    let file = File::options().create(true).append(true).open(&path).at(&path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).at(&path)
}

fn complete(dir: &Path) -> bool {
    ["vmlinuz", "initrd.cpio.gz", "initrd-tiny.cpio.gz"].iter().all(|name| dir.join(name).is_file())
}

fn pack(dir: &Path, parts: &initrd::Parts<'_>) -> Result<()> {
    let image = newest(&parts.kernel.join("boot"), "vmlinuz-")?.ok_or_else(|| bad_package(parts.kernel))?;
    replace(&dir.join("vmlinuz"), &fs::read(&image).at(&image)?)?;
    for (name, contents) in
        [("initrd.cpio.gz", initrd::Contents::All), ("initrd-tiny.cpio.gz", initrd::Contents::Tiny)]
    {
        let raw = dir.join(name.trim_end_matches(".gz"));
        fs::write(&raw, parts.archive(contents)?).at(&raw)?;
        let packed = Cmd::new("gzip").args(["-n", "-9", "-k", "-f"]).arg(&raw).output();
        fs::remove_file(&raw).at(&raw)?;
        packed?;
    }
    Ok(())
}

/// Writes beside the target and renames, so that a machine that boots meanwhile reads the old file or the new one whole.
fn replace(target: &Path, content: &[u8]) -> Result<()> {
    let beside = target.with_extension("new");
    fs::write(&beside, content).at(&beside)?;
    fs::rename(&beside, target).at(target)
}

/// The folder of the unpacked newest package whose name starts with `prefix`.
fn unpacked(cache: &Path, prefix: &str, options: &Options) -> Result<PathBuf> {
    let package = match newest(cache, prefix)?.filter(|file| file.extension().is_some_and(|e| e == "deb")) {
        Some(package) if !options.refresh => package,
        _ if options.offline => return Err(not_cached(cache, prefix)),
        _ => step(&format!("guest: download {prefix}"), || download(cache, prefix))?,
    };
    let folder = package.with_extension("d");
    if !folder.is_dir() {
        let half = package.with_extension("half");
        let _ = fs::remove_dir_all(&half);
        Cmd::new("dpkg-deb").arg("-x").arg(&package).arg(&half).output()?;
        fs::rename(&half, &folder).at(&folder)?;
    }
    Ok(folder)
}

fn download(cache: &Path, prefix: &str) -> Result<PathBuf> {
    let name = match prefix {
        "linux-image-" => kernel_package()?,
        other => other.to_owned(),
    };
    Cmd::new("apt-get")
        .args(["-o", "APT::Sandbox::User=", "download", &name])
        .dir(cache)
        .limit(DOWNLOAD_LIMIT)
        .output()
        .map_err(|failure| {
            failure.remedy("check the network and the sources of apt; as root, run apt-get update")
        })?;
    newest(cache, &name)?.ok_or_else(|| Failure::new(format!("apt-get download {name} left no file")))
}

/// The package behind `linux-image-cloud-amd64`, which itself is empty and depends on the current version.
fn kernel_package() -> Result<String> {
    let depends =
        Cmd::new("apt-cache").args(["depends", META_PACKAGE]).env("LC_ALL", "C").output().unwrap_or_default();
    parse_depends(&depends).ok_or_else(|| {
        Failure::new(format!("the package archive does not know {META_PACKAGE}")).remedy(
            "as root, run: apt-get update\nor give a kernel of your own with --kernel PATH --initrd PATH",
        )
    })
}

fn parse_depends(depends: &str) -> Option<String> {
    depends
        .lines()
        .find_map(|l| l.trim().strip_prefix("Depends: "))
        .filter(|p| p.starts_with("linux-image-"))
        .map(str::to_owned)
}

/// The last file under `dir` whose name starts with `prefix`, in the order of its numbers.
fn newest(dir: &Path, prefix: &str) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(dir).at(dir)?;
    let named =
        entries.flatten().map(|e| e.path()).filter(|p| p.is_file() && file_name(p).starts_with(prefix));
    Ok(named.max_by_key(|path| numbers(&file_name(path))))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The numbers in `text`, so that 6.1.0-56 is newer than 6.1.0-9.
fn numbers(text: &str) -> Vec<u64> {
    text.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Builds the program that runs inside the guest, without any shared library.
fn guest_tool(dir: &Path) -> Result<PathBuf> {
    let target_dir = dir.join("tool");
    let built = target_dir.join(TARGET).join("release/guest-tool");
    let sources = root().join("examples/xtask/guest");
    let sources: Vec<PathBuf> = fs::read_dir(&sources).at(&sources)?.flatten().map(|e| e.path()).collect();
    if sources.iter().all(|source| is_newer(&built, source)) {
        return Ok(built);
    }
    let build = Cmd::new(cargo())
        .args(["build", "--quiet", "--release", "--package", "guest-tool", "--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .dir(&root())
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=symbols")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        // A build folder of its own, so that a long build elsewhere does not hold this one up.
        .env_remove("CARGO_BUILD_BUILD_DIR")
        .limit(BUILD_LIMIT);
    step("guest: build guest-tool", || build.output())?;
    Ok(built)
}

fn is_newer(made: &Path, source: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
    matches!((time(made), time(source)), (Ok(made), Ok(source)) if made >= source)
}

fn not_cached(cache: &Path, prefix: &str) -> Failure {
    Failure::new(format!("{} holds no {prefix}*.deb", cache.display()))
        .remedy("run `cargo xtask setup` once with a network")
}

fn bad_package(folder: &Path) -> Failure {
    Failure::new(format!("{} holds no kernel", folder.display()))
        .remedy("remove target/guest/cache and run `cargo xtask setup`")
}

const META_PACKAGE: &str = "linux-image-cloud-amd64";
const TARGET: &str = "x86_64-unknown-linux-gnu";
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(10 * 60);
const BUILD_LIMIT: Duration = Duration::from_secs(20 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_meta_package_names_the_real_one() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(parse_depends(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(parse_depends("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn the_newest_version_is_by_number_and_not_by_letter() {
        assert!(numbers("linux-image-6.1.0-56-cloud") > numbers("linux-image-6.1.0-9-cloud"));
        assert!(numbers("linux-image-6.12.0-1-cloud") > numbers("linux-image-6.1.0-56-cloud"));
    }

    #[test]
    fn a_missing_product_is_never_newer_than_its_source() {
        let here = Path::new(file!()).file_name().map(|_| root().join("Cargo.toml")).unwrap();
        assert!(!is_newer(Path::new("/nonexistent/product"), &here));
        assert!(is_newer(&here, &here));
    }
}
