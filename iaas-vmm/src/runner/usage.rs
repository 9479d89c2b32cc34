//! What one boot of a VM uses: cumulative totals from moments stamped at the effect. Pure.

use std::collections::BTreeMap;

use iaas_core::Boot;
use iaas_core::Id;
use iaas_core::Term;
use iaas_core::spi::Reading;
use iaas_core::spi::Stamp;
use iaas_core::spi::hypervisor::Vm;
use uuid::Uuid;

/// Nanoseconds of virtual CPU: the VM's vCPUs times the time in which they ran or could have.
pub const VCPU_NS: &str = "vcpu-ns";
/// Nanoseconds of processor time that the VM really took.
pub const CPU_NS: &str = "cpu-ns";
/// Byte-nanoseconds of memory, also while the VM is paused.
pub const MEMORY_BYTE_NS: &str = "memory-byte-ns";

/// The counters of one life, which is one boot.
#[derive(Clone, Debug)]
pub struct Usage {
    id: Uuid,
    term: Term,
    boot: Boot,
    vcpus: u32,
    memory: u64,
    seq: u64,
    started: Option<u64>,
    running: Option<u64>,
    ran_ns: u64,
    held_ns: u64,
    cpu_ns: u64,
}

impl Usage {
    /// Counters at zero for a VM of that size.
    pub fn new(id: Uuid, (term, boot): (Term, Boot), (vcpus, memory): (u32, u64)) -> Self {
        Self {
            id,
            term,
            boot,
            vcpus,
            memory,
            seq: 0,
            started: None,
            running: None,
            ran_ns: 0,
            held_ns: 0,
            cpu_ns: 0,
        }
    }

    /// The VM has its memory from `at` on.
    pub fn started(&mut self, at: Stamp) {
        self.started.get_or_insert(at.mono_ns);
    }

    /// Its vCPUs run from `at` on.
    pub fn running(&mut self, at: Stamp) {
        self.started(at);
        self.running.get_or_insert(at.mono_ns);
    }

    /// Its vCPUs stand from `at` on.
    pub fn paused(&mut self, at: Stamp) {
        self.ran_ns += span(self.running.take(), at);
    }

    /// It is gone from `at` on.
    pub fn ended(&mut self, at: Stamp) {
        self.paused(at);
        self.held_ns += span(self.started.take(), at);
    }

    /// Takes the processor time so far; it never goes back.
    pub fn took_cpu(&mut self, ns: u64) {
        self.cpu_ns = self.cpu_ns.max(ns);
    }

    /// The totals at `at`.
    pub fn reading(&mut self, at: Stamp, fin: bool) -> Reading {
        self.seq += 1;
        let ran = u128::from(self.ran_ns + span(self.running, at));
        let held = u128::from(self.held_ns + span(self.started, at));
        let totals = BTreeMap::from([
            (VCPU_NS.to_owned(), ran * u128::from(self.vcpus)),
            (MEMORY_BYTE_NS.to_owned(), held * u128::from(self.memory)),
            (CPU_NS.to_owned(), u128::from(self.cpu_ns)),
        ]);
        let of = Id::<Vm>::from_uuid(self.id).object();
        Reading { of, term: self.term, life: self.boot.0, seq: self.seq, fin, at, totals }
    }
}

fn span(since: Option<u64>, at: Stamp) -> u64 {
    since.map_or(0, |since| at.mono_ns.saturating_sub(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u64) -> Stamp {
        Stamp { wall: jiff::Timestamp::UNIX_EPOCH, boot_id: Uuid::nil(), mono_ns: second * 1_000_000_000 }
    }

    #[test]
    fn a_paused_vm_uses_memory_but_no_vcpu() {
        let mut usage = Usage::new(Uuid::nil(), (Term(1), Boot(3)), (2, 10));
        usage.started(at(100));
        usage.running(at(102));
        usage.paused(at(112));
        usage.running(at(142));
        usage.ended(at(147));
        let reading = usage.reading(at(500), true);
        // 2 vCPU × (10 s + 5 s); 10 bytes × 47 s.
        assert_eq!(reading.totals[VCPU_NS], 30_000_000_000);
        assert_eq!(reading.totals[MEMORY_BYTE_NS], 470_000_000_000);
        assert_eq!((reading.life, reading.seq, reading.fin), (3, 1, true));
    }

    #[test]
    fn totals_and_numbers_only_grow() {
        let mut usage = Usage::new(Uuid::nil(), (Term(1), Boot(1)), (1, 1));
        usage.running(at(1));
        usage.took_cpu(9);
        let first = usage.reading(at(2), false);
        usage.took_cpu(3);
        let second = usage.reading(at(3), false);
        assert!(second.seq > first.seq);
        assert!(first.totals.iter().all(|(meter, total)| second.totals[meter] >= *total));
    }
}
