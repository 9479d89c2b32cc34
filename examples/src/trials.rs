//! What the cloud is put through under running guests, and what they saw of it.

use std::net::IpAddr;
use std::time::Duration;

use iaas_core::Cloud;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::cloud::Session;
use iaas_core::model::Instance;
use iaas_core::model::Port;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Verdict;

use crate::gaps;
use crate::gaps::Seen;
use crate::guest::Guest;
use crate::guest::value;
use crate::machine;
use crate::machine::Arguments;
use crate::memory::Memory;
use crate::report::Report;
use crate::supervise;
use crate::supervise::Process;

/// Asks the network why it dropped what the guest missed.
///
/// # Errors
/// `Internal` if the explanation says otherwise.
pub async fn explain_drop(me: &Session, from: Id<Port>, dst: IpAddr, report: &mut Report) -> Result<()> {
    let packet = PacketQuery { from, src: None, dst, protocol: 6, src_port: 40000, dst_port: 81 };
    let trace = me.explain_packet(packet).await?;
    machine::ensure(trace.verdict == Verdict::Dropped, || format!("explain disagrees: {trace:?}"))?;
    let stages: Vec<_> = trace.stages.iter().map(|s| format!("{}: {}", s.stage, s.because)).collect();
    report.step("explain", stages.join(" → "));
    Ok(())
}

/// Whether a guest lived through a real restart of control: the process `before` is gone, `now` is another one, and the
/// guest still says `boot_id`, and has run for longer than the `since` seconds at which control died.
///
/// # Errors
/// `Internal` if control was not restarted, or the guest was started anew.
pub fn check_adopted(
    (before, now): (Process, Process),
    (boot_id, since): (&str, f64),
    alive: &str,
) -> Result<String> {
    machine::ensure(before != now && !before.is_alive(), || {
        format!("control was not restarted: {before:?} was to be killed, and {now:?} is here")
    })?;
    machine::ensure(value(alive, "boot_id") == Some(boot_id), || {
        format!("the guest was started anew: {alive}, was {boot_id}")
    })?;
    let uptime = value(alive, "uptime").and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    machine::ensure(uptime > since, || {
        format!("the guest's clock did not go on: {alive}, was {since:.2} when control was killed")
    })?;
    Ok(format!("{alive}; control was process {}, is {}", before.pid, now.pid))
}

/// Control was killed and is back: the same guests run, and noticed nothing.
///
/// # Errors
/// `Internal` if a guest was started anew.
pub async fn adopt(cloud: &Cloud, me: &Session, memory: &Memory, report: &mut Report) -> Result<()> {
    let mut at_client = Guest::follow(me, memory.client);
    report.waiting("control is back and looks for its guests");
    let now = Process::me().map_err(machine::io)?;
    for (id, boot_id, name) in
        [(memory.web, &memory.boot_ids[0], "web"), (memory.client, &memory.boot_ids[1], "client")]
    {
        let mut guest = Guest::follow(me, id);
        let from = guest.now().await?;
        let alive = guest.line_after(from, "ALIVE boot_id", BOOT).await?.1;
        // The client's clock was noted when control died; the web's was not.
        let since = memory.killed_at.filter(|_| name == "client").unwrap_or(0.0);
        let evidence = check_adopted((memory.control, now), (boot_id, since), &alive)?;
        report.step("adopted", format!("{name}: {evidence}"));
    }
    machine::ensure(cloud.orphans_removed() == 0, || "a sweep removed something".to_owned())?;
    let Some(killed_at) = memory.killed_at else { return Ok(()) };
    gaps::reach(&mut at_client, killed_at + PERIOD).await?;
    let seen = gaps::between(&at_client, killed_at, killed_at + PERIOD)?;
    report.step("gap", format!("control killed: {}; quiet: {}", shown(seen), shown(memory.quiet)));
    report.figure("gap.control", serde_json::json!({ "killed": seen, "quiet": memory.quiet }));
    Ok(())
}

/// Kills the switch under running traffic.
///
/// # Errors
/// `Internal` if no new one came.
pub async fn restart_switch(
    me: &Session,
    memory: &Memory,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    let mut at_client = Guest::follow(me, memory.client);
    at_client.line("TICK", BOOT).await?;
    let from = gaps::uptime(&at_client).unwrap_or(0.0);
    let old = supervise::roles("switch", &arguments.state);
    machine::ensure(!old.is_empty(), || "there is no switch to kill".to_owned())?;
    old.iter().try_for_each(|pid| machine::kill(*pid))?;
    gaps::reach(&mut at_client, from + PERIOD).await?;
    let new = supervise::roles("switch", &arguments.state);
    machine::ensure(!new.is_empty() && new != old, || format!("the switch was not started again: {new:?}"))?;
    let seen = gaps::between(&at_client, from, from + PERIOD)?;
    report.step("gap", format!("switch killed: {}; quiet: {}", shown(seen), shown(memory.quiet)));
    report.figure("gap.switch", serde_json::json!({ "killed": seen, "quiet": memory.quiet }));
    Ok(())
}

/// The bill so far, held against what a guest and the runners count themselves, and one proof out of the audit log.
///
/// # Errors
/// `Internal` if the bill and one of them disagree, or a proof does not hold.
pub async fn bill(
    me: &Session,
    memory: &Memory,
    web: Id<Instance>,
    arguments: &Arguments,
    report: &mut Report,
) -> Result<()> {
    let project = me.projects().get(memory.project).await?;
    let mut client = Guest::follow(me, memory.client);
    let ran = [("web", web), ("client", memory.client)]
        .map(|(name, id)| machine::ran(&arguments.state, id).map(|before| (name, id, before)));
    let before = client.ask("stats", "NETSTAT").await?;
    let bill = me.bill_so_far(memory.project, project.meta.created).await?;
    let after = client.ask("stats", "NETSTAT").await?;
    for line in &bill.lines {
        let name = format!("{} {}", line.resource.kind, &line.resource.id.to_string()[24..]);
        let amount = format!("{:>22} {:<9} × {:>8}", line.quantity, line.unit, line.unit_price);
        report.step(
            "bill",
            format!("{name:<28} {:<13} {amount} = {} {}", line.meter, line.cost, bill.currency),
        );
    }
    report.step("bill", format!("total {} {}", bill.total, bill.currency));
    report.step("bytes", machine::check_bytes(&bill, memory.client_port, &before, &after)?);
    for ran in ran {
        let (name, id, before) = ran?;
        let told =
            machine::check_vcpu(&bill, id, before, machine::ran_until_now(&arguments.state, id).await?)?;
        report.step("vcpu", format!("{name}: {told}"));
    }
    let entries = me.audit().entries().await?;
    let at = entries.iter().position(|e| e.object == web.object());
    let at = at.ok_or_else(|| iaas_core::Error::internal("the audit log knows nothing of the web"))?;
    let index = at as u64;
    let (leaf, proof, checkpoint) = me.audit().prove(index).await?;
    proof.verify(&leaf, &checkpoint.root())?;
    let proved = format!("entry {index} ({}) is proved to be in it", entries[at].action);
    report.step("audit", format!("{} entries, root {}; {proved}", checkpoint.size(), checkpoint.root()));
    Ok(())
}

/// A period in words.
pub fn shown(seen: Seen) -> String {
    format!(
        "longest gap {:.0} ms, slowest connect {:.0} ms, {} fetches ({} failed)",
        seen.gap_ms, seen.connect_ms, seen.fetches, seen.failed
    )
}

/// A guest under emulation needs seconds to boot, on a busy machine many.
pub const BOOT: Duration = Duration::from_secs(240);
/// Seconds of the guest's own clock that a gap is looked for in.
pub const PERIOD: f64 = 5.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_is_adopted_only_if_control_was_really_restarted() {
        let alive = "ALIVE boot_id=one uptime=9.00";
        let me = Process::me().unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let other = Process::of(i32::try_from(child.id()).unwrap()).unwrap();
        // Nothing was restarted; and a control that was to be killed but runs on beside us.
        for before in [me, other] {
            let error = check_adopted((before, me), ("one", 8.0), alive).unwrap_err();
            assert!(error.to_string().contains("not restarted"), "{error}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(check_adopted((other, me), ("one", 8.0), alive).is_ok());
        let error = check_adopted((other, me), ("two", 8.0), alive).unwrap_err();
        assert!(error.to_string().contains("started anew"), "{error}");
        let error = check_adopted((other, me), ("one", 9.5), alive).unwrap_err();
        assert!(error.to_string().contains("did not go on"), "{error}");
    }
}
