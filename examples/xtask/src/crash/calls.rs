//! Which system calls change something outside the calling process.

use std::path::Path;

use nix::libc;

/// One system call at its entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    /// The kernel's number for it.
    pub(super) number: i64,
    /// Its first four arguments.
    pub(super) args: [u64; 4],
}

/// What the judgement of a call needs to know of its caller.
pub(super) trait Caller {
    /// What a file descriptor points to.
    fn fd(&self, fd: u64) -> Option<String>;
    /// Whether a file descriptor is a netlink socket.
    fn is_netlink(&self, fd: u64) -> bool;
    /// Eight bytes of the caller's memory.
    fn word(&self, address: u64) -> Option<u64>;
}

/// When a call counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// Each time.
    Always,
    /// When the flags in this argument make or empty a file.
    Opens(usize),
    /// The same for `openat2`, whose flags stand in memory.
    OpensHow,
    /// When the descriptor in the first argument is a file below the state folder.
    BelowState,
    /// When it makes or keeps a tun or tap device.
    Tun,
    /// When it goes to a netlink socket.
    Netlink,
    /// When it makes a process and not a thread.
    Process,
    /// The same for `clone3`, whose flags stand in memory.
    Process3,
}

/// The name of the call if it changes something.
pub(super) fn mutating(call: Call, caller: &dyn Caller, state: &Path) -> Option<&'static str> {
    let (_, name, rule) = TABLE.iter().find(|(number, ..)| *number == call.number)?;
    let counts = match rule {
        Rule::Always => true,
        Rule::Opens(at) => makes(call.args[*at]),
        Rule::OpensHow => caller.word(call.args[2]).is_some_and(makes),
        Rule::BelowState => caller.fd(call.args[0]).is_some_and(|path| Path::new(&path).starts_with(state)),
        Rule::Tun => TUN_REQUESTS.contains(&call.args[1]),
        Rule::Netlink => caller.is_netlink(call.args[0]),
        Rule::Process => !is_thread(call.args[0]),
        Rule::Process3 => caller.word(call.args[0]).is_none_or(|flags| !is_thread(flags)),
    };
    counts.then_some(*name)
}

/// The kind of call of this name.
pub(super) fn kind(name: &str) -> Option<&'static str> {
    TABLE.iter().map(|(_, known, _)| *known).find(|known| *known == name)
}

fn makes(flags: u64) -> bool {
    flags & (bits(libc::O_CREAT) | bits(libc::O_TRUNC)) != 0
}

fn is_thread(flags: u64) -> bool {
    flags & bits(libc::CLONE_THREAD) != 0
}

const fn bits(flags: libc::c_int) -> u64 {
    flags.unsigned_abs() as u64
}

/// `TUNSETIFF` and `TUNSETPERSIST` of `linux/if_tun.h`: `_IOW('T', 202, int)` and `_IOW('T', 203, int)`.
const TUN_REQUESTS: [u64; 2] = [0x4004_54ca, 0x4004_54cb];

const TABLE: [(i64, &str, Rule); 50] = [
    (libc::SYS_mkdir, "mkdir", Rule::Always),
    (libc::SYS_mkdirat, "mkdirat", Rule::Always),
    (libc::SYS_rmdir, "rmdir", Rule::Always),
    (libc::SYS_rename, "rename", Rule::Always),
    (libc::SYS_renameat, "renameat", Rule::Always),
    (libc::SYS_renameat2, "renameat2", Rule::Always),
    (libc::SYS_unlink, "unlink", Rule::Always),
    (libc::SYS_unlinkat, "unlinkat", Rule::Always),
    (libc::SYS_link, "link", Rule::Always),
    (libc::SYS_linkat, "linkat", Rule::Always),
    (libc::SYS_symlink, "symlink", Rule::Always),
    (libc::SYS_symlinkat, "symlinkat", Rule::Always),
    (libc::SYS_open, "open", Rule::Opens(1)),
    (libc::SYS_openat, "openat", Rule::Opens(2)),
    (libc::SYS_openat2, "openat2", Rule::OpensHow),
    (libc::SYS_creat, "creat", Rule::Always),
    (libc::SYS_truncate, "truncate", Rule::Always),
    (libc::SYS_ftruncate, "ftruncate", Rule::Always),
    (libc::SYS_fallocate, "fallocate", Rule::Always),
    (libc::SYS_write, "write", Rule::BelowState),
    (libc::SYS_pwrite64, "pwrite64", Rule::BelowState),
    (libc::SYS_writev, "writev", Rule::BelowState),
    (libc::SYS_pwritev, "pwritev", Rule::BelowState),
    (libc::SYS_pwritev2, "pwritev2", Rule::BelowState),
    (libc::SYS_copy_file_range, "copy_file_range", Rule::Always),
    (libc::SYS_fsync, "fsync", Rule::BelowState),
    (libc::SYS_fdatasync, "fdatasync", Rule::BelowState),
    (libc::SYS_sync_file_range, "sync_file_range", Rule::BelowState),
    (libc::SYS_io_uring_enter, "io_uring_enter", Rule::Always),
    (libc::SYS_mount, "mount", Rule::Always),
    (libc::SYS_umount2, "umount2", Rule::Always),
    (libc::SYS_ioctl, "ioctl-tun", Rule::Tun),
    (libc::SYS_sendto, "sendto-netlink", Rule::Netlink),
    (libc::SYS_sendmsg, "sendmsg-netlink", Rule::Netlink),
    (libc::SYS_sendmmsg, "sendmmsg-netlink", Rule::Netlink),
    (libc::SYS_bind, "bind", Rule::Always),
    (libc::SYS_connect, "connect", Rule::Always),
    (libc::SYS_fork, "fork", Rule::Always),
    (libc::SYS_vfork, "vfork", Rule::Always),
    (libc::SYS_clone, "clone", Rule::Process),
    (libc::SYS_clone3, "clone3", Rule::Process3),
    (libc::SYS_execve, "execve", Rule::Always),
    (libc::SYS_execveat, "execveat", Rule::Always),
    (libc::SYS_kill, "kill", Rule::Always),
    (libc::SYS_tgkill, "tgkill", Rule::Always),
    (libc::SYS_pidfd_send_signal, "pidfd_send_signal", Rule::Always),
    (libc::SYS_chmod, "chmod", Rule::Always),
    (libc::SYS_fchmod, "fchmod", Rule::Always),
    (libc::SYS_fchmodat, "fchmodat", Rule::Always),
    (libc::SYS_memfd_create, "memfd_create", Rule::Always),
];

#[cfg(test)]
mod tests {
    use super::*;

    struct Known;

    impl Caller for Known {
        fn fd(&self, fd: u64) -> Option<String> {
            match fd {
                3 => Some("/state/store".to_owned()),
                4 => Some("/state-other/x".to_owned()),
                5 => Some("socket:[7]".to_owned()),
                _ => None,
            }
        }

        fn is_netlink(&self, fd: u64) -> bool {
            fd == 5
        }

        fn word(&self, address: u64) -> Option<u64> {
            match address {
                0x10 => Some(bits(libc::O_CREAT)),
                0x20 => Some(bits(libc::CLONE_THREAD)),
                _ => Some(0),
            }
        }
    }

    fn named(number: i64, args: [u64; 4]) -> Option<&'static str> {
        mutating(Call { number, args }, &Known, Path::new("/state"))
    }

    #[test]
    fn writes_count_below_the_state_folder_only() {
        assert_eq!(named(libc::SYS_write, [3, 0, 0, 0]), Some("write"));
        assert_eq!(named(libc::SYS_write, [4, 0, 0, 0]), None, "a name that only starts alike");
        assert_eq!(named(libc::SYS_fsync, [9, 0, 0, 0]), None, "a closed descriptor");
    }

    #[test]
    fn an_open_counts_when_it_makes_or_empties() {
        assert_eq!(named(libc::SYS_openat, [0, 0, bits(libc::O_RDONLY), 0]), None);
        assert_eq!(named(libc::SYS_openat, [0, 0, bits(libc::O_CREAT), 0]), Some("openat"));
        assert_eq!(named(libc::SYS_open, [0, bits(libc::O_TRUNC), 0, 0]), Some("open"));
        assert_eq!(named(libc::SYS_openat2, [0, 0, 0x10, 0]), Some("openat2"));
        assert_eq!(named(libc::SYS_openat2, [0, 0, 0x30, 0]), None);
    }

    #[test]
    fn a_new_process_counts_and_a_new_thread_does_not() {
        assert_eq!(named(libc::SYS_clone, [17, 0, 0, 0]), Some("clone"));
        assert_eq!(named(libc::SYS_clone, [bits(libc::CLONE_THREAD), 0, 0, 0]), None);
        assert_eq!(named(libc::SYS_clone3, [0x20, 0, 0, 0]), None);
        assert_eq!(named(libc::SYS_clone3, [0x30, 0, 0, 0]), Some("clone3"));
    }

    #[test]
    fn only_netlink_sends_and_tun_requests_count_among_their_kind() {
        assert_eq!(named(libc::SYS_sendmsg, [5, 0, 0, 0]), Some("sendmsg-netlink"));
        assert_eq!(named(libc::SYS_sendmsg, [3, 0, 0, 0]), None);
        assert_eq!(named(libc::SYS_ioctl, [3, 0x4004_54ca, 0, 0]), Some("ioctl-tun"));
        assert_eq!(named(libc::SYS_ioctl, [3, 0x5401, 0, 0]), None);
        assert_eq!(named(libc::SYS_read, [3, 0, 0, 0]), None);
    }

    #[test]
    fn every_number_stands_in_the_table_once() {
        let mut numbers: Vec<i64> = TABLE.iter().map(|row| row.0).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), TABLE.len());
    }
}
