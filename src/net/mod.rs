//! WebRTC: peers, SDP, ICE, tracks, data channel, congestion.
