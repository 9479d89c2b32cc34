//! Who is at the other end of a Unix socket, asked of the kernel (sock_diag(7)).

use netlink_packet_core::NLM_F_REQUEST;
use netlink_packet_core::NetlinkHeader;
use netlink_packet_core::NetlinkMessage;
use netlink_packet_core::NetlinkPayload;
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::unix::ShowFlags;
use netlink_packet_sock_diag::unix::StateFlags;
use netlink_packet_sock_diag::unix::UnixRequest;
use netlink_sys::Socket;
use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

/// The inode of the peer of the Unix socket with this inode; `None` if it has none, or is no Unix socket.
pub(crate) fn peer(inode: u32) -> Option<u32> {
    let request = UnixRequest {
        state_flags: StateFlags::all(),
        inode,
        show_flags: ShowFlags::PEER,
        // Any socket of that inode.
        cookie: [0xff; 8],
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut ask = NetlinkMessage::new(header, SockDiagMessage::UnixRequest(request).into());
    ask.finalize();
    let mut bytes = vec![0; ask.buffer_len()];
    ask.serialize(&mut bytes);
    let mut kernel = Socket::new(NETLINK_SOCK_DIAG).unwrap();
    kernel.bind_auto().unwrap();
    kernel.connect(&SocketAddr::new(0, 0)).unwrap();
    kernel.send(&bytes, 0).unwrap();
    let (answer, _) = kernel.recv_from_full().unwrap();
    match NetlinkMessage::<SockDiagMessage>::deserialize(&answer).unwrap().payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::UnixResponse(response)) => response.peer(),
        _ => None,
    }
}
